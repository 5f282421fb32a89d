// Runs a row rule (common/rules.h).
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/reduce.h"
#include "cpu/widen.h"

namespace pyadv {
namespace cpu {

template <class C>
struct ScalarBox {
  C low, high;
  PYADV_HD C lo(int64_t) const { return low; }
  PYADV_HD C hi(int64_t) const { return high; }
};

template <class C>
struct VaryingBox {
  const C *low, *high;
  PYADV_HD C lo(int64_t i) const { return low[i]; }
  PYADV_HD C hi(int64_t i) const { return high[i]; }
};

// The `row` of a row rule, in its arithmetic type.
template <class Rule, class C, class Box>
class Row {
 public:
  PYADV_HD Row(const RulePointers<C>& pointers, int64_t n, const Box& box)
      : p_(pointers), n_(n), box_(box) {}

  PYADV_HD int64_t size() const { return n_; }

  template <int K, class L, class Term>
  PYADV_HD void sums(const Term& term, double (&total)[K]) const {
    cpu::sums<K, L>(n_, [&](int64_t i, L(&t)[K]) PYADV_INLINE_LAMBDA { term(at(i), t); }, total);
  }

  template <class Value>
  PYADV_HD C maximum(const Value& value) const {
    return cpu::maximum<C>(n_, [&](int64_t i) PYADV_INLINE_LAMBDA { return value(at(i)); }, C(0));
  }

  template <class Value>
  PYADV_HD void store(const Value& value) const {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n_; ++i) p_.out[i] = value(at(i));
  }

  PYADV_HD void copy_input() const {
    if (p_.out != p_.x_adv) std::copy(p_.x_adv, p_.x_adv + n_, p_.out);
  }

 private:
  PYADV_HD Element<C> at(int64_t i) const {
    return element_at<Rule>(p_, i, box_.lo(i), box_.hi(i));
  }

  RulePointers<C> p_;
  int64_t n_;
  Box box_;
};

template <class Rule>
struct RowLoop {
  template <class C, class Box, class Values>
  PYADV_HD static void run(const RulePointers<C>& p, int64_t n, Box box, Values values) {
    Rule::template run<C>(Row<Rule, C, Box>(p, n, box), values);
  }
};

// Gives a row rule a row in its arithmetic type. A rule makes several passes, so rows of 16-bit
// floats are widened once into a buffer and rounded once at the end.
template <class C>
class WideRow {
 public:
  explicit WideRow(int64_t) {}
  template <class Run>
  void around(const RulePointers<C>& p, int64_t, Run&& run) {
    run(p);
  }
};

template <class T>
class NarrowRow {
 public:
  explicit NarrowRow(int64_t n) : buffer_(static_cast<size_t>(4 * n)) {}
  template <class Run>
  void around(const RulePointers<T>& p, int64_t n, Run&& run) {
    float* wide = buffer_.data();
    const auto widened = [&](const T* from, int slot) {
      if (from != nullptr) cpu::run<WidenLoop>(from, wide + slot * n, n);
      return wide + slot * n;
    };
    const RulePointers<float> q{widened(p.x_adv, 0), widened(p.grad, 1), widened(p.x, 2),
                                widened(p.x_prev, 3), wide};
    run(q);
    cpu::run<NarrowLoop>(static_cast<const float*>(wide), p.out, n);
  }

 private:
  std::vector<float> buffer_;
};

template <class Rule>
void run_rows(const typename Rule::Args& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    std::conditional_t<std::is_same<T, C>::value, WideRow<C>, NarrowRow<T>> rows(s.n);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r * s.n;
      const RulePointers<T> p = pointers_at<T>(s, i);
      if (s.active != nullptr && !s.active[r]) {
        if (p.out != p.x_adv) std::copy(p.x_adv, p.x_adv + s.n, p.out);
        continue;
      }
      rows.around(p, s.n, [&](const RulePointers<C>& q) {
        const auto values = s.template values_at<C>(i);
        if (s.per_element)
          run<RowLoop<Rule>>(
              q, s.n, VaryingBox<C>{values_from<C>(s.lo, i), values_from<C>(s.hi, i)}, values);
        else
          run_wide<RowLoop<Rule>>(
              q, s.n, ScalarBox<C>{s.lo.template at<C>(i), s.hi.template at<C>(i)}, values);
      });
    }
  });
}

}  // namespace cpu
}  // namespace pyadv
