// Runs a rule on rows (L2Step and the like; see common/projections.h).
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/reduce.h"

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

// The row a rule walks over, in its arithmetic type.
template <class Rule, class C, class Box>
class Row {
 public:
  PYADV_HD Row(const StepPointers<C>& pointers, int64_t n, const Box& box)
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

  PYADV_HD void keep() const {
    if (p_.out != p_.a) std::copy(p_.a, p_.a + n_, p_.out);
  }

 private:
  PYADV_HD Element<C> at(int64_t i) const {
    return element_at<Rule>(p_, i, box_.lo(i), box_.hi(i));
  }

  StepPointers<C> p_;
  int64_t n_;
  Box box_;
};

template <class Rule>
struct RowLoop {
  template <class C, class Box>
  PYADV_HD static void run(const StepPointers<C>& p, int64_t n, Box box, Sizes<C> sizes) {
    Rule::template run<C>(Row<Rule, C, Box>(p, n, box), sizes);
  }
};

struct WidenLoop {
  template <class T>
  PYADV_HD static void run(const T* from, float* to, int64_t n) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  }
};

struct NarrowLoop {
  template <class T>
  PYADV_HD static void run(const float* from, T* to, int64_t n) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
  }
};

// A row as the rules take it. 16-bit rows are widened once, since a rule passes over them several
// times, and rounded once.
template <class C>
class WideRow {
 public:
  explicit WideRow(int64_t) {}
  template <class Run>
  void around(const StepPointers<C>& p, int64_t, Run&& run) {
    run(p);
  }
};

template <class T>
class NarrowRow {
 public:
  explicit NarrowRow(int64_t n) : buffer_(static_cast<size_t>(4 * n)) {}
  template <class Run>
  void around(const StepPointers<T>& p, int64_t n, Run&& run) {
    float* wide = buffer_.data();
    const auto widened = [&](const T* from, int slot) {
      if (from != nullptr) cpu::run<WidenLoop>(from, wide + slot * n, n);
      return wide + slot * n;
    };
    const StepPointers<float> q{widened(p.a, 0), widened(p.g, 1), widened(p.x, 2),
                                widened(p.prev, 3), wide};
    run(q);
    cpu::run<NarrowLoop>(static_cast<const float*>(wide), p.out, n);
  }

 private:
  std::vector<float> buffer_;
};

template <class Rule>
void run_rows(const StepArgs& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    std::conditional_t<std::is_same<T, C>::value, WideRow<C>, NarrowRow<T>> rows(s.n);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = r * s.n;
      const StepPointers<T> p = pointers_at<T>(s, i);
      if (s.active != nullptr && !s.active[r]) {
        if (p.out != p.a) std::copy(p.a, p.a + s.n, p.out);
        continue;
      }
      rows.around(p, s.n, [&](const StepPointers<C>& q) {
        const Sizes<C> sizes = sizes_at<C>(s, i);
        if (s.elementwise)
          run<RowLoop<Rule>>(q, s.n, VaryingBox<C>{values_at<C>(s.lo, i), values_at<C>(s.hi, i)},
                             sizes);
        else
          run_wide<RowLoop<Rule>>(q, s.n, ScalarBox<C>{s.lo.at<C>(i), s.hi.at<C>(i)}, sizes);
      });
    }
  });
}

}  // namespace cpu
}  // namespace pyadv
