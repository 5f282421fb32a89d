#include "common/activation.h"

#include <algorithm>

#include "cpu/clones.h"
#include "cpu/kernels.h"

namespace pyadv {
namespace cpu {
namespace {

constexpr int kBlock = 256;  // elements whose intermediate values stay in the cache

// Writes the parameter's values for the elements [first, first + n).
template <class C>
PYADV_HD void fill(const Param& p, int64_t first, int64_t n, C* to) {
  const C* from = static_cast<const C*>(p.data);
  for (int64_t i = 0; i < n;) {
    const int64_t at = first + i, k = at / p.inner % p.period;
    const bool along = p.inner == 1;  // successive elements read successive values
    const int64_t run = std::min(n - i, along ? p.period - k : p.inner - at % p.inner);
    if (along)
      for (int64_t j = 0; j < run; ++j) to[i + j] = from[k + j];
    else
      for (int64_t j = 0; j < run; ++j) to[i + j] = from[k];
    i += run;
  }
}

template <class T>
PYADV_HD const T* elements(const void* data, int64_t first) {
  return static_cast<const T*>(data) + first;
}

// Each step is a loop of its own over a block, so that all of them vectorise for any combination
// of absent tensors.
template <class T, class C>
PYADV_HD void load(const T* from, int64_t n, C* v) {
  PYADV_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) v[i] = widen(from[i]);
}

template <class T, class C>
PYADV_HD void store(const C* v, int64_t n, T* to) {
  PYADV_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(v[i]);
}

// Rounds each sum to the type R.
template <class R, class T, class C>
PYADV_HD void add(const T* terms, int64_t n, C* v) {
  PYADV_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) v[i] = widen(narrow<R>(v[i] + widen(terms[i])));
}

template <class C>
PYADV_HD void multiply(const C* factors, int64_t n, C* v) {
  PYADV_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) v[i] = v[i] * factors[i];
}

template <class T>
struct AffineReluLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const AffineReluArgs* a, int64_t begin, int64_t end) {
    C v[kBlock], p[kBlock];
    const C slope = static_cast<C>(a->slope);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, end - first);
      load(elements<T>(a->x, first), n, v);
      if (a->added != nullptr) add<T>(elements<T>(a->added, first), n, v);
      if (a->sum != nullptr) store(v, n, static_cast<T*>(a->sum) + first);
      if (a->scale.data != nullptr) {
        fill(a->scale, first, n, p);
        multiply(p, n, v);
      }
      if (a->shift.data != nullptr) {
        fill(a->shift, first, n, p);
        add<C>(p, n, v);
      }
      T* out = static_cast<T*>(a->out) + first;
      PYADV_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(below_zero(v[i], v[i], slope));
    }
  }
};

template <class T>
struct AffineReluBackwardLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const AffineReluBackwardArgs* a, int64_t begin, int64_t end) {
    C v[kBlock], p[kBlock];
    const C slope = static_cast<C>(a->slope);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, end - first);
      load(elements<T>(a->grad, first), n, v);
      if (a->other != nullptr) add<C>(elements<T>(a->other, first), n, v);
      const T* y = elements<T>(a->y, first);
      PYADV_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) v[i] = below_zero(widen(y[i]), v[i], slope);
      if (a->scale.data != nullptr) {
        fill(a->scale, first, n, p);
        multiply(p, n, v);
      }
      if (a->added != nullptr) add<C>(elements<T>(a->added, first), n, v);
      store(v, n, static_cast<T*>(a->out) + first);
    }
  }
};

}  // namespace

void affine_relu(const AffineReluArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype,
           [&](auto tag) { run<AffineReluLoop<typename decltype(tag)::type>>(&args, begin, end); });
}

void affine_relu_backward(const AffineReluBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    run<AffineReluBackwardLoop<typename decltype(tag)::type>>(&args, begin, end);
  });
}

}  // namespace cpu
}  // namespace pyadv
