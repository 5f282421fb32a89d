// Storage types and their arithmetic types. 16-bit floats are widened to float and rounded once.
#pragma once

#include <cstring>

#include "common/macros.h"

namespace pyadv {

enum class DType : int { Float, Double, Half, BFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class To, class From>
PYADV_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

PYADV_HD float widen(float v) { return v; }
PYADV_HD double widen(double v) { return v; }

PYADV_HD float widen(const BFloat16& v) {
  return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

PYADV_HD float widen(const Half& v) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  // Without branches, so that loops vectorise. Normal numbers: change the exponent's bias. Others:
  // let a float subtraction normalise them.
  const uint32_t w = static_cast<uint32_t>(v.bits) << 16;
  const uint32_t sign = w & 0x80000000u;
  const uint32_t two_w = w + w;
  const float normal = bit_cast<float>((two_w >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float denormal = bit_cast<float>((two_w >> 17) | (126u << 23)) - 0.5f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(two_w < (1u << 27) ? denormal : normal));
#endif
}

template <class T>
PYADV_HD T narrow(compute_t<T> v) {
  return v;
}

template <>
PYADV_HD BFloat16 narrow<BFloat16>(float v) {
  const uint32_t w = bit_cast<uint32_t>(v);
  const uint32_t rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>((w & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

template <>
PYADV_HD Half narrow<Half>(float v) {
#if defined(__CUDA_ARCH__)
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
#else
  const uint32_t w = bit_cast<uint32_t>(v);
  const uint32_t two_w = w + w;
  uint32_t bias = two_w & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const float magnitude = bit_cast<float>(w & 0x7FFFFFFFu);
  const float scaled = (magnitude * 0x1.0p+112f) * 0x1.0p-110f;  // infinite where half overflows
  const uint32_t bits = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t nonsign = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  const uint32_t sign = (w & 0x80000000u) >> 16;
  return {static_cast<uint16_t>(sign | (two_w > 0xFF000000u ? 0x7E00u : nonsign))};
#endif
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the storage type T of `dtype`.
template <class F>
auto dispatch(DType dtype, F&& f) -> decltype(f(Tag<float>{})) {
  switch (dtype) {
    case DType::Double:
      return f(Tag<double>{});
    case DType::Half:
      return f(Tag<Half>{});
    case DType::BFloat16:
      return f(Tag<BFloat16>{});
    default:
      return f(Tag<float>{});
  }
}

// A scalar or tensor parameter (alpha, eps, lo, hi) in the op's arithmetic type. Element i of the
// data reads data[(i / inner) % period]; if data is null, every element reads the host's `value`.
struct Param {
  const void* data = nullptr;
  double value = 0.0;
  int64_t inner = 1;
  int64_t period = 1;

  template <class C>
  PYADV_HD C at(int64_t i) const {
    if (data == nullptr) return static_cast<C>(value);
    if (period == 1) return *static_cast<const C*>(data);
    const int64_t k = inner == 1 ? i : i / inner;  // divisions are slow
    return static_cast<const C*>(data)[k < period ? k : k % period];
  }
};

// The longest span of at most `length` elements in which `p` is constant. The `inner` of parameters
// nest (the pixels of a channel, the elements of a row), so the smallest one divides the others.
PYADV_HD int64_t shorter_span(const Param& p, int64_t length) {
  return p.data != nullptr && p.period > 1 && p.inner < length ? p.inner : length;
}

}  // namespace pyadv
