// Runs an element rule (common/rules.h) over a flat range.
#pragma once

#include <algorithm>

#include "common/rules.h"
#include "cpu/clones.h"
#include "cpu/spans.h"

namespace pyadv {
namespace cpu {

template <class T>
struct RulePointers {
  const T *x_adv, *grad, *x, *x_prev;
  T* out;
};

// Element i of the tensors. Those that the rule does not read are not touched.
template <class Rule, class T, class C = compute_t<T>>
PYADV_HD Element<C> element_at(const RulePointers<T>& p, int64_t i, C lo, C hi) {
  return {widen(p.x_adv[i]),
          Rule::kGrad ? widen(p.grad[i]) : C(0),
          widen(p.x[i]),
          Rule::kPrev ? widen(p.x_prev[i]) : C(0),
          lo,
          hi};
}

template <class T>
RulePointers<T> pointers_at(const RuleTensors& s, int64_t i) {
  const auto at = [i](const void* p) {
    return p == nullptr ? nullptr : static_cast<const T*>(p) + i;
  };
  return {at(s.x_adv), at(s.grad), at(s.x), at(s.x_prev), static_cast<T*>(s.out) + i};
}

template <class Rule>
struct ElementLoop {
  template <class T, class Values, class C>
  PYADV_HD static void run(const RulePointers<T>& p, int64_t n, Values values, C lo, C hi) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      p.out[i] = narrow<T>(Rule::apply(element_at<Rule>(p, i, lo, hi), values));
  }
};

// For parameters that hold one value per element: `pointers` are a family's parameters.
template <class Rule>
struct VaryingLoop {
  template <class T, class C, class Pointers>
  PYADV_HD static void run(const RulePointers<T>& p, int64_t n, const Pointers& pointers,
                           const C* lo, const C* hi) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const auto values =
          pointers.template map<C>([i](const C* q) PYADV_INLINE_LAMBDA { return q[i]; });
      p.out[i] = narrow<T>(Rule::apply(element_at<Rule>(p, i, lo[i], hi[i]), values));
    }
  }
};

template <class C>
const C* values_from(const Param& p, int64_t i) {
  return static_cast<const C*>(p.data) + i % p.period;
}

template <class Rule>
void run_elements(const typename Rule::Args& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const int64_t whole = s.active != nullptr || s.per_element ? s.n : end;
    const int64_t length = s.per_element ? whole : span_length(s, whole);
    for_spans(begin, end, length, [&](int64_t i, int64_t last) {
      const RulePointers<T> p = pointers_at<T>(s, i);
      if (s.active != nullptr && !s.active[i / s.n]) {
        if (p.out != p.x_adv) std::copy(p.x_adv, p.x_adv + (last - i), p.out);
      } else if (s.per_element) {
        const auto pointers = s.params.template map<const C*>(
            [i](const Param& param) { return values_from<C>(param, i); });
        run<VaryingLoop<Rule>>(p, last - i, pointers, values_from<C>(s.lo, i),
                               values_from<C>(s.hi, i));
      } else {
        run_wide<ElementLoop<Rule>>(p, last - i, s.template values_at<C>(i), s.lo.template at<C>(i),
                                    s.hi.template at<C>(i));
      }
    });
  });
}

}  // namespace cpu
}  // namespace pyadv
