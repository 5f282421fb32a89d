#include "common/convolution.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/clones.h"
#include "cpu/kernels.h"

#if defined(PYADV_HAS_CLONES)
#include <immintrin.h>
#endif

namespace pyadv {
namespace cpu {
namespace {

constexpr int64_t kLineFloats = 16;  // of a cache line

// Tiles at a time. Few enough for their transformed input to stay in the cache, enough to use a
// panel of weights, which may come from memory, several times; a multiple of kRows.
int64_t winograd_block(int64_t inputs) { return inputs <= 256 ? 24 : 48; }

// Rows of tiles one after the other must not all fall into the same few sets of the cache.
int64_t padded_row(int64_t channels) {
  return (channels + kLineFloats - 1) / kLineFloats * kLineFloats + kLineFloats;
}

#if defined(PYADV_HAS_CLONES)
namespace avx512 {
#define PYADV_TARGET __attribute__((target(PYADV_AVX512)))
constexpr int kLanes = 16, kRows = 12;
using Lanes = __m512;
PYADV_TARGET inline Lanes splat(float s) { return _mm512_set1_ps(s); }
PYADV_TARGET inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#include "cpu/winograd_lanes.h"
#undef PYADV_TARGET
}  // namespace avx512

namespace avx2 {
#define PYADV_TARGET __attribute__((target("avx2,fma")))
constexpr int kLanes = 8, kRows = 6;
using Lanes = __m256;
PYADV_TARGET inline Lanes splat(float s) { return _mm256_set1_ps(s); }
PYADV_TARGET inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
#include "cpu/winograd_lanes.h"
#undef PYADV_TARGET
}  // namespace avx2
#endif

namespace baseline {
#define PYADV_TARGET
constexpr int kLanes = 4, kRows = 6;
typedef float Lanes __attribute__((vector_size(16)));
inline Lanes splat(float s) { return Lanes{s, s, s, s}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
#include "cpu/winograd_lanes.h"
#undef PYADV_TARGET
}  // namespace baseline

// G w G^T in double precision, rounded once.
struct WeightLoop {
  PYADV_HD static void line(const double* w, int from, double* u, int to) {
    constexpr double near = kNear, far = kFar, near2 = near * near, far2 = far * far;
    constexpr double at_near = 1 / (2 * near2 * (near2 - far2)),
                     at_far = 1 / (2 * far2 * (far2 - near2));
    PYADV_INDEPENDENT
    for (int n = 0; n < kPanel; ++n) {
      const double w0 = w[n], w1 = w[from * kPanel + n], w2 = w[2 * from * kPanel + n];
      const double near_even = (w0 + near2 * w2) * at_near, near_odd = near * w1 * at_near;
      const double far_even = (w0 + far2 * w2) * at_far, far_odd = far * w1 * at_far;
      u[n] = w0 / (near2 * far2);
      u[to * kPanel + n] = near_even + near_odd;
      u[2 * to * kPanel + n] = near_even - near_odd;
      u[3 * to * kPanel + n] = far_even + far_odd;
      u[4 * to * kPanel + n] = far_even - far_odd;
      u[5 * to * kPanel + n] = w2;
    }
  }

  PYADV_HD static void run(const WinogradWeightArgs* args, int64_t begin, int64_t end) {
    const WinogradWeightArgs& a = *args;
    double w[9 * kPanel] = {}, t[18 * kPanel], u[kPoints * kPanel];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / a.inputs, c = item % a.inputs;
      const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, a.outputs - first);
      for (int64_t n = 0; n < kPanel; ++n) {
        const float* from = a.weight + (first + n) * a.output_stride + c * a.input_stride;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j)
            w[(3 * i + j) * kPanel + n] =
                n < count ? from[i * a.row_stride + j * a.column_stride] : 0.0;
      }
      for (int j = 0; j < 3; ++j) line(w + j * kPanel, 3, t + j * kPanel, 3);
      for (int i = 0; i < kPatch; ++i) line(t + 3 * i * kPanel, 1, u + kPatch * i * kPanel, 1);
      for (int k = 0; k < kPoints; ++k) {
        float* to = a.out + ((panel * kPoints + k) * a.inputs + c) * kPanel;
        PYADV_INDEPENDENT
        for (int n = 0; n < kPanel; ++n) to[n] = static_cast<float>(u[k * kPanel + n]);
      }
    }
  }
};

// Room that a thread keeps from call to call: fresh pages would cost a tenth of the convolution.
float* room_of(int64_t floats) {
  thread_local std::unique_ptr<float[]> kept;
  thread_local int64_t size = 0;
  if (size < floats) {
    kept.reset(new float[static_cast<size_t>(floats + kLineFloats)]);
    size = floats;
  }
  const size_t misplaced = reinterpret_cast<size_t>(kept.get()) / sizeof(float) % kLineFloats;
  return kept.get() + (kLineFloats - misplaced) % kLineFloats;
}

}  // namespace

void winograd_weight(const WinogradWeightArgs& args, int64_t begin, int64_t end) {
  run<WeightLoop>(&args, begin, end);
}

void winograd_conv2d(const WinogradArgs& args, int64_t begin, int64_t end) {
  const int64_t step = padded_row(args.inputs);
  const int64_t block = std::min(end - begin, winograd_block(args.inputs));
  float* room = room_of(step + kPoints * (block * (step + kPanel) + 2 * kLineFloats));
#if defined(PYADV_HAS_CLONES)
  if (has_avx512()) return avx512::convolve(args, begin, end, block, room);
  if (has_fma()) return avx2::convolve(args, begin, end, block, room);
#endif
  baseline::convolve(args, begin, end, block, room);
}

}  // namespace cpu
}  // namespace pyadv
