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

constexpr int64_t kLineFloats = 16;  // floats per cache line

constexpr int64_t kMostTiles = 48;  // tiles per block, at most

// Tiles per block, a multiple of kRows. Few tiles keep their points in the cache. More tiles reuse
// a panel of weights more often, which pays when the weights come from memory.
int64_t block_of(int64_t inputs, int64_t outputs) {
  return inputs * outputs <= 256 * 256 ? 12 : kMostTiles;
}

int64_t whole_lines(int64_t floats) {
  return (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
}

// The position of a tile.
struct Place {
  int64_t image, row, column;
};

// Sets the positions of the tiles [begin, end), at most kMostTiles, and returns their number.
int64_t places_of(const WinogradArgs& a, int64_t begin, int64_t end, Place* places) {
  const int64_t per_image = a.tiles_down * a.tiles_across;
  for (int64_t tile = begin; tile < end; ++tile)
    *places++ = {tile / per_image, tile % per_image / a.tiles_across, tile % a.tiles_across};
  return std::max<int64_t>(end - begin, 0);
}

// Returns a buffer that the thread keeps between calls; fresh pages would cost a tenth of the time.
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

// Computes U in double precision and rounds once.
struct WeightLoop {
  PYADV_HD static void line(const double* w, int from, double* u, int to, bool two_taps) {
    constexpr double near = kNear, far = kFar, near2 = near * near, far2 = far * far;
    // Factors of G at the points +-near and +-far; the point 0 exists unless there are two taps.
    const double at_near = 1 / (2 * near * (near2 - far2) * (two_taps ? 1 : near)),
                 at_far = 1 / (2 * far * (far2 - near2) * (two_taps ? 1 : far));
    const double sign = two_taps ? -1 : 1;
    const int first = two_taps ? 0 : 1, infinity = first + 4, other = two_taps ? 5 : 0;
    PYADV_INDEPENDENT
    for (int n = 0; n < kPanel; ++n) {
      const double w0 = w[n], w1 = w[from * kPanel + n], w2 = w[2 * from * kPanel + n];
      const double even = w0, odd = two_taps ? w2 : w1, square = two_taps ? 0.0 : w2;
      const double near_even = (even + near2 * square) * at_near, near_odd = near * odd * at_near;
      const double far_even = (even + far2 * square) * at_far, far_odd = far * odd * at_far;
      u[first * to * kPanel + n] = near_even + near_odd;
      u[(first + 1) * to * kPanel + n] = sign * (near_even - near_odd);
      u[(first + 2) * to * kPanel + n] = far_even + far_odd;
      u[(first + 3) * to * kPanel + n] = sign * (far_even - far_odd);
      u[infinity * to * kPanel + n] = w2;
      u[other * to * kPanel + n] = two_taps ? w1 : w0 / (near2 * far2);
    }
  }

  PYADV_HD static void run(const WinogradWeightArgs* args, int64_t begin, int64_t end) {
    const WinogradWeightArgs& a = *args;
    const bool two_taps = a.stride == 2;
    double w[9 * kPanel], t[18 * kPanel], u[kSlots * kPanel];
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
      for (int j = 0; j < 3; ++j) line(w + j * kPanel, 3, t + j * kPanel, 3, two_taps);
      for (int i = 0; i < 6; ++i) line(t + 3 * i * kPanel, 1, u + 6 * i * kPanel, 1, two_taps);
      for (int k = 0; k < kSlots; ++k) {
        float* to = a.out + ((panel * kSlots + k) * a.inputs + c) * kPanel;
        PYADV_INDEPENDENT
        for (int n = 0; n < kPanel; ++n) to[n] = static_cast<float>(u[k * kPanel + n]);
      }
    }
  }
};

}  // namespace

void winograd_weight(const WinogradWeightArgs& args, int64_t begin, int64_t end) {
  run<WeightLoop>(&args, begin, end);
}

void winograd(const WinogradArgs& args, int64_t begin, int64_t end) {
#if defined(PYADV_HAS_CLONES)
  if (has_avx512()) return avx512::convolve(args, begin, end);
  if (has_fma()) return avx2::convolve(args, begin, end);
#endif
  baseline::convolve(args, begin, end);
}

}  // namespace cpu
}  // namespace pyadv
