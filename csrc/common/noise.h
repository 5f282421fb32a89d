// Keyed noise (Philox 4x32-10) and row hashes. Formulas: pyadv/reference/noise.py.
#pragma once

#include <cmath>

#include "common/exp.h"
#include "common/types.h"

namespace pyadv {

// A 64-bit integer, known on the host or read from device memory when the kernel runs.
struct Integer {
  const int64_t* data = nullptr;
  int64_t value = 0;
  PYADV_HD uint64_t get() const { return static_cast<uint64_t>(data == nullptr ? value : *data); }
};

// `rows` x `n` elements in row-major order.
struct NoiseArgs {
  DType dtype;
  void* out;
  const int64_t* ids;  // [rows]
  Integer seed, stream;
  int64_t rows, n;
};

struct HashArgs {
  DType dtype;
  const void* x;  // [rows, n], row-major
  int64_t* out;   // [rows]
  int64_t rows, n;
};

constexpr int kBlockWords = 4;  // 32-bit words of one Philox block

PYADV_HD int64_t noise_blocks(int64_t n) { return (n + kBlockWords - 1) / kBlockWords; }

struct Words {
  uint32_t w[kBlockWords];
};

PYADV_HD uint32_t high_word(uint64_t v) { return static_cast<uint32_t>(v >> 32); }
PYADV_HD uint32_t low_word(uint64_t v) { return static_cast<uint32_t>(v); }

// Philox 4x32-10 for one row: holds the words that are constant in the row and computes any block.
struct Philox {
  uint32_t stream, id_low, id_high, key_low, key_high;

  PYADV_HD Philox(const NoiseArgs& args, int64_t row)
      : stream(low_word(args.stream.get())),
        id_low(low_word(static_cast<uint64_t>(args.ids[row]))),
        id_high(high_word(static_cast<uint64_t>(args.ids[row]))),
        key_low(low_word(args.seed.get())),
        key_high(high_word(args.seed.get())) {}

  PYADV_HD Words operator()(uint32_t block) const {
    uint32_t c0 = block, c1 = stream, c2 = id_low, c3 = id_high, k0 = key_low, k1 = key_high;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = high_word(p1) ^ c1 ^ k0;
      c1 = low_word(p1);
      c2 = high_word(p0) ^ c3 ^ k1;
      c3 = low_word(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

// Random bits per number: those of T's significand, so that rounding cannot give 1. float64 uses
// the values of float32.
template <class T>
struct UniformBits {
  static constexpr int value = 24;
};
template <>
struct UniformBits<Half> {
  static constexpr int value = 11;
};
template <>
struct UniformBits<BFloat16> {
  static constexpr int value = 8;
};

template <class T>
struct Uniform {
  PYADV_HD void operator()(const Words& words, T* out) const {
    using C = compute_t<T>;
    constexpr int bits = UniformBits<T>::value;
    for (int i = 0; i < kBlockWords; ++i)
      out[i] = narrow<T>(static_cast<C>(static_cast<int32_t>(words.w[i] >> (32 - bits))) *
                         (C(1) / (1 << bits)));
  }
};

// cos and sin of t in [-pi/4, pi/4], by the polynomials of Cephes.
PYADV_HD void small_turn(float t, float& cosine, float& sine) {
  const float s = t * t;
  cosine =
      ((2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f) * (s * s) -
      0.5f * s + 1.0f;
  sine = ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f) * s * t + t;
}
PYADV_HD void small_turn(double t, double& cosine, double& sine) {
  const double s = t * t;
  const double c = ((((-1.13585365213876817300e-11 * s + 2.08757008419747316778e-9) * s -
                      2.75573141792967388112e-7) *
                         s +
                     2.48015872888517045348e-5) *
                        s -
                    1.38888888888730564116e-3) *
                       s +
                   4.16666666666665929218e-2;
  const double d = ((((1.58962301576546568060e-10 * s - 2.50507477628578072866e-8) * s +
                      2.75573136213857245213e-6) *
                         s -
                     1.98412698295895385996e-4) *
                        s +
                    8.33333333332211858878e-3) *
                       s -
                   1.66666666666666307295e-1;
  cosine = c * (s * s) - 0.5 * s + 1.0;
  sine = d * s * t + t;
}

template <class T>
struct Normal {
  PYADV_HD void operator()(const Words& words, T* out) const {
    for (int i = 0; i < kBlockWords; i += 2) pair(words.w[i], words.w[i + 1], out + i);
  }

  // Box-Muller. Integer arithmetic splits off the quarter turns, so the remaining angle is exact.
  PYADV_HD static void pair(uint32_t length, uint32_t angle, T* out) {
    using C = compute_t<T>;
    const int32_t share = (1 << 24) - static_cast<int32_t>(length >> 8);  // (1 - u) 2^24, never 0
    const C radius = sqrt(C(-2) * log_normal(static_cast<C>(share) * C(0x1.0p-24)));
    const int32_t turn = static_cast<int32_t>(angle >> 8);
    const int32_t quarter = (turn + (1 << 21)) >> 22;
    C cosine, sine;
    small_turn(static_cast<C>(turn - (quarter << 22)) * C(0x1.0p-22) * C(1.5707963267948966),
               cosine, sine);
    const C sign = (quarter & 2) != 0 ? -radius : radius;
    out[0] = narrow<T>(sign * ((quarter & 1) != 0 ? -sine : cosine));
    out[1] = narrow<T>(sign * ((quarter & 1) != 0 ? cosine : sine));
  }
};

// The finaliser of splitmix64.
PYADV_HD uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// What distinguishes element i from the others of its row.
PYADV_HD uint64_t hash_offset(uint64_t i) { return 0x9E3779B97F4A7C15u * (i + 1); }

// An element's term of the sum; the row's hash is the mix of that sum.
template <class T>
PYADV_HD uint64_t hash_term(const T& value, uint64_t offset) {
  const double v = static_cast<double>(widen(value));
  const double canonical = v == 0.0 ? 0.0 : v;  // -0.0
  const uint64_t bits = v != v ? 0x7FF8000000000000u : bit_cast<uint64_t>(canonical);
  return mix(bits + offset);
}

}  // namespace pyadv
