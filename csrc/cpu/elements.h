// Runs an elementwise rule (LinfStep and the like) over a flat range.
#pragma once

#include <algorithm>

#include "common/projections.h"
#include "cpu/clones.h"
#include "cpu/spans.h"

namespace pyadv {
namespace cpu {

template <class T>
struct StepPointers {
  const T *a, *g, *x, *prev;
  T* out;
};

// Element i of a rule's tensors; those it does not read are not touched.
template <class Rule, class T, class C = compute_t<T>>
PYADV_HD Element<C> element_at(const StepPointers<T>& p, int64_t i, C lo, C hi) {
  return {widen(p.a[i]),
          Rule::kGrad ? widen(p.g[i]) : C(0),
          widen(p.x[i]),
          Rule::kPrev ? widen(p.prev[i]) : C(0),
          lo,
          hi};
}

template <class T>
StepPointers<T> pointers_at(const StepArgs& s, int64_t i) {
  const auto at = [i](const void* p) {
    return p == nullptr ? nullptr : static_cast<const T*>(p) + i;
  };
  return {at(s.x_adv), at(s.grad), at(s.x), at(s.x_prev), static_cast<T*>(s.out) + i};
}

template <class Rule>
struct ElementLoop {
  template <class T, class C>
  PYADV_HD static void run(const StepPointers<T>& p, int64_t n, Sizes<C> sizes, C lo, C hi) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      p.out[i] = narrow<T>(Rule::apply(element_at<Rule>(p, i, lo, hi), sizes));
  }
};

// Parameters that vary from element to element.
template <class Rule>
struct VaryingLoop {
  template <class T, class C>
  PYADV_HD static void run(const StepPointers<T>& p, int64_t n, C momentum, const C* alpha,
                           const C* eps, const C* lo, const C* hi) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      p.out[i] = narrow<T>(Rule::apply(element_at<Rule>(p, i, lo[i], hi[i]),
                                       Sizes<C>{alpha[i], eps[i], momentum, C(0)}));
  }
};

template <class C>
const C* values_at(const Param& p, int64_t i) {
  return static_cast<const C*>(p.data) + i % p.period;
}

template <class Rule>
void run_elements(const StepArgs& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const int64_t whole = s.active != nullptr || s.elementwise ? s.n : end;
    const int64_t length =
        s.elementwise ? whole : span_length({&s.alpha, &s.eps, &s.momentum, &s.lo, &s.hi}, whole);
    for_spans(begin, end, length, [&](int64_t i, int64_t last) {
      const StepPointers<T> p = pointers_at<T>(s, i);
      if (s.active != nullptr && !s.active[i / s.n]) {
        if (p.out != p.a) std::copy(p.a, p.a + (last - i), p.out);
      } else if (s.elementwise) {
        run<VaryingLoop<Rule>>(p, last - i, s.momentum.at<C>(i), values_at<C>(s.alpha, i),
                               values_at<C>(s.eps, i), values_at<C>(s.lo, i),
                               values_at<C>(s.hi, i));
      } else {
        run_wide<ElementLoop<Rule>>(p, last - i, sizes_at<C>(s, i), s.lo.at<C>(i), s.hi.at<C>(i));
      }
    });
  });
}

}  // namespace cpu
}  // namespace pyadv
