// Winograd's convolution F(4x4, 3x3). Formulas: pyadv/reference/convolution.py.
//
// An output tile of 4x4 pixels is A^T [sum over channels of U * (B^T d B)] A, with d the 6x6 pixels
// it depends on and U = G w G^T the transformed kernel: 36 products where the sum over the window
// has 144. Evaluated at the points 0, +-5/8, +-3/2 and infinity, whose float32 error is less than
// half of that at the usual 0, +-1, +-2; every constant below is exact.
#pragma once

#include "common/types.h"

namespace pyadv {

constexpr int kTile = 4;           // outputs per side of a tile
constexpr int kPatch = kTile + 2;  // inputs per side
constexpr int kPoints = kPatch * kPatch;
constexpr int kPanel = 32;  // output channels that are computed together

constexpr float kNear = 0.625f, kFar = 1.5f;  // the points
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;
constexpr float kSum2 = kNear2 + kFar2, kProduct2 = kNear2 * kFar2;

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// U of a kernel w(output, input, 3, 3), in panels: out[panel][point][input][output in panel].
struct WinogradWeightArgs {
  const float* weight;
  int64_t output_stride, input_stride, row_stride, column_stride;
  int64_t outputs, inputs;
  float* out;
};

// Images are dense, channels innermost: [batch][height][width][channels].
struct WinogradArgs {
  const float* x;
  const float* weight;  // U
  const float* bias;    // or nullptr
  float* out;
  int64_t inputs, outputs;  // channels
  int64_t height, width, padding;
  int64_t out_height, out_width;
  int64_t tiles_down, tiles_across;  // of an image
};

}  // namespace pyadv
