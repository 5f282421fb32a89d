// Winograd's convolution of 3x3 windows. Formulas: pyadv/reference/convolution.py.
//
// An output tile of 4x4 pixels is A^T [sum over channels of U * (B^T d B)] A, where d are the input
// pixels that it depends on and U = G w G^T is the transformed kernel. The products are taken at
// points instead of windows. The three forms:
//
//                         input      points    output     products, direct
//   stride 1, both ways   6x6        6x6       4x4        36, 144
//   stride 2              9x9        9x9       4x4        81, 144
//   its transpose         5x5        9x9       8x8        81, 144
//
// At stride 2 the outer two taps of a line meet every second pixel. That is a convolution of stride
// 1 with two taps, which needs five points for four outputs. The middle tap meets the pixels
// between and needs four plain products, which share one U. So each side has six different U.
//
// The points are +-5/8, +-3/2, infinity, and at stride 1 also 0. There the float32 error is less
// than half that of the usual points 0, +-1, +-2. Every constant of B and A is exact.
#pragma once

#include "common/types.h"

namespace pyadv {

constexpr int kSlots = 6 * 6;  // different U per kernel
constexpr int kPanel = 32;     // output channels computed together

constexpr float kNear = 0.625f, kFar = 1.5f;
constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;
constexpr float kSum2 = kNear2 + kFar2, kProduct2 = kNear2 * kFar2;

enum class WinogradForm { Stride1, Stride2, Transposed2 };

// Output pixels per side of a tile.
inline int64_t tile_of(WinogradForm form) { return form == WinogradForm::Transposed2 ? 8 : 4; }

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Computes U of a kernel w(output, input, 3, 3) in panels: out[panel][slot][input][output in
// panel].
struct WinogradWeightArgs {
  const float* weight;
  int64_t output_stride, input_stride, row_stride, column_stride;
  int64_t outputs, inputs;
  int64_t stride;  // the convolution's, 1 or 2
  float* out;
};

// Images are dense, channels innermost: [batch][height][width][channels].
struct WinogradArgs {
  WinogradForm form;
  const float* x;
  const float* weight;  // U
  const float* bias;    // this and the next two may be nullptr
  const float* added;   // added to the result; has its layout
  const float* mask;    // has the result's layout; where it is not positive, the result is 0
  bool relu;            // applied to the sum, before the mask
  float* out;
  int64_t inputs, outputs;  // channels
  int64_t height, width;
  int64_t out_height, out_width;
  int64_t padding;                   // pixels by which the first tile's input lies outside
  int64_t tiles_down, tiles_across;  // per image
};

}  // namespace pyadv
