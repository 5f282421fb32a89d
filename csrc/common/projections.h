// Projections onto a norm ball around x and onto the box. Specification:
// pyadv/reference/projections.py.
//
// The L2 and L1 rules work on whole rows, in passes. They are written once, against a `Row` that
// each device brings, which walks over the elements:
//   row.size()                            number of elements
//   row.sums<K, L>(term, double total[K]) term(element, L t[K]) gives the terms of one element; L
//   is
//                                         the type they are added up in
//   row.maximum(value)                    largest value(element), at least 0; NaN if one is NaN
//   row.store(value)                      out = value(element), rounded
//   row.keep()                            out = x_adv
// A point on the way to the result is a function of the element, so that nothing is stored in
// between.
#pragma once

#include <cmath>
#include <limits>

#include "common/math.h"
#include "common/types.h"

namespace pyadv {

// Of square_step: a square for each row of images (channels, height, width), in the box of which
// uniform numbers u in [0, 1) choose its place: top, left, and a sign for each channel.
struct Window {
  const float* u;  // [rows, 2 + channels]
  int64_t side, channels, height, width;
  int64_t stride[3];  // of the dimensions of a row; 1 for those of size 1

  PYADV_HD const float* of(int64_t row) const { return u + row * (2 + channels); }
  PYADV_HD int64_t top(int64_t row) const { return corner(of(row)[0], height - side); }
  PYADV_HD int64_t left(int64_t row) const { return corner(of(row)[1], width - side); }
  PYADV_HD bool up(int64_t row, int64_t channel) const { return of(row)[2 + channel] >= 0.5f; }

  // In 0 .. most, whatever v is.
  PYADV_HD static int64_t corner(float v, int64_t most) {
    const float at = v * static_cast<float>(most + 1);
    return !(at >= 0.0f) ? 0 : at < static_cast<float>(most) ? static_cast<int64_t>(at) : most;
  }
};

// One fused step or projection of `rows` x `n` elements that lie in the same dense order in every
// tensor. Tensors and parameters that an op lacks stay empty.
struct StepArgs {
  DType dtype;
  const void* x_adv;
  const void* x;
  const void* grad = nullptr;
  const void* x_prev = nullptr;  // of square_step the best point
  void* out;                     // may be one of the inputs
  Param alpha, eps, momentum, keep, lo, hi;
  // The parameters that differ within a row hold one value per element, in the order of the data:
  // all of alpha, eps, lo and hi for elementwise rules, lo and hi for rules on rows.
  bool elementwise = false;
  const bool* active = nullptr;  // [rows] or nullptr; rows that are not active are copied
  Window window{};
  int64_t rows, n;
};

// What a rule reads of one element, and of one row. Rules say with `kGrad` and `kPrev` which of the
// tensors they read.
template <class C>
struct Element {
  C a, g, x, prev, lo, hi;
};

template <class C>
struct Sizes {
  C alpha, eps, momentum, keep;
};

template <class C>
PYADV_HD Sizes<C> sizes_at(const StepArgs& s, int64_t i) {
  return {s.alpha.at<C>(i), s.eps.at<C>(i), s.momentum.at<C>(i), s.keep.at<C>(i)};
}

// min(max(v, x - eps), x + eps), then the box: exact in any precision, unlike x + clamp(delta).
template <class C>
PYADV_HD C linf_clip(C v, const Element<C>& e, C eps) {
  return clip_to_ball_and_box(v, e.x - eps, e.x + eps, e.lo, e.hi);
}

// As constants, because device code may not call the functions of numeric_limits.
template <class C>
struct Range {
  static constexpr C kSmallest = std::numeric_limits<C>::min();  // with full precision
  static constexpr C kLargest = std::numeric_limits<C>::max();
  static constexpr int kExponent = std::numeric_limits<C>::max_exponent;
};

// ||f|| over a row is value / scale; the scale is a power of two, 1 for rows of ordinary size.
template <class C>
struct Norm {
  C value, scale;
  PYADV_HD bool finite() const { return value <= Range<C>::kLargest; }
};

// The largest power of two that brings `largest` > 0 to about 1 and is a normal number.
template <class C>
PYADV_HD C unit_scale(C largest) {
  constexpr int kMost = Range<C>::kExponent - 2;
  const int e = -ilogb(largest);
  return static_cast<C>(scalbn(1.0, e < -kMost ? -kMost : e > kMost ? kMost : e));
}

template <class C, class Row, class F>
PYADV_HD double sum_of_squares(const Row& row, const F& f, C scale) {
  double total[1];
  row.template sums<1, C>(
      [&](const Element<C>& e, C(&t)[1]) PYADV_INLINE_LAMBDA {
        const C v = f(e) * scale;
        t[0] = v * v;
      },
      total);
  return total[0];
}

// A float sum of n squares that lost nothing to under- or overflow.
template <class C>
PYADV_HD bool is_ordinary(double sum, int64_t n) {
  return sum > 64.0 * static_cast<double>(Range<C>::kSmallest) * static_cast<double>(n) &&
         sum <= Range<C>::kLargest;
}

// A second, scaled pass only for rows whose squares under- or overflow.
template <class C, class Row, class F>
PYADV_HD Norm<C> l2_norm(const Row& row, const F& f) {
  const double total = sum_of_squares<C>(row, f, C(1));
  if (is_ordinary<C>(total, row.size())) return {static_cast<C>(sqrt(total)), C(1)};
  const C largest =
      row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(f(e)); });
  if (!(largest > 0 && largest <= Range<C>::kLargest)) return {largest, C(1)};
  const C scale = unit_scale(largest);
  return {static_cast<C>(sqrt(sum_of_squares<C>(row, f, scale))), scale};
}

// The point `v` of a row, moved towards x by `shrink` where `outside` the ball, then into the box.
template <class C, class V>
struct L2Clip {
  V v;
  bool outside;
  C shrink;
  PYADV_HD C operator()(const Element<C>& e) const {
    const C at = v(e);
    return clip(outside ? e.x + (at - e.x) * shrink : at, e.lo, e.hi);
  }
};

template <class C, class Row, class V>
PYADV_HD L2Clip<C, V> l2_clip(const Row& row, const V& v, C eps) {
  const Norm<C> norm =
      l2_norm<C>(row, [&](const Element<C>& e) PYADV_INLINE_LAMBDA { return v(e) - e.x; });
  const double length = static_cast<double>(norm.value) / norm.scale;
  return {v, length > eps, static_cast<C>(eps / length)};
}

// What the box leaves on the side of x where d points.
template <class C>
PYADV_HD C room(const Element<C>& e, C d) {
  const C left = d > 0 ? e.hi - e.x : e.x - e.lo;
  return left > 0 ? left : C(0);
}

// The nearest point of ball and box: x + t (v - x) in the box, for the largest t <= 1 in the ball.
// t grows towards it from where only the ball binds: with the entries that the box holds at t
// fixed, the others give the next t. The held entries only become more, so this ends, and exactly.
template <class C, class Row, class V>
PYADV_HD L2Clip<C, V> l2_box_clip(const Row& row, const V& v, C eps) {
  const auto pass = [&](double t, double (&total)[3]) PYADV_INLINE_LAMBDA {
    row.template sums<3, double>(
        [&](const Element<C>& e, double (&s)[3]) PYADV_INLINE_LAMBDA {
          const C offset = v(e) - e.x;
          const double d = offset, most = room(e, offset);
          const bool held = t * magnitude(d) >= most;
          s[0] = held ? 0.0 : d * d;
          s[1] = held ? most * most : 0.0;
          s[2] = held ? 1.0 : 0.0;
        },
        total);
  };
  const double square = static_cast<double>(eps) * eps;
  double total[3];  // squares of the free entries, of the held ones, number held
  pass(1.0, total);
  if (!(total[0] + total[1] > square)) return {v, false, C(1)};
  double t = 0.0;
  pass(t, total);
  for (double held = -1.0; total[2] > held; pass(t, total)) {
    held = total[2];
    const double next = sqrt((square - total[1]) / total[0]);
    if (!(next > t)) break;
    t = next;
  }
  return {v, true, static_cast<C>(t)};
}

// The point `v` of a row, its distance from x lowered by `threshold` entry by entry and limited to
// the room in the box; a row inside the ball has the threshold 0.
template <class C, class V>
struct L1Clip {
  V v;
  C threshold;
  PYADV_HD C operator()(const Element<C>& e) const {
    const C at = v(e), d = at - e.x, most = room(e, d);
    C size = magnitude(d) - threshold;
    size = size > 0 ? size : C(0);
    size = size < most ? size : most;
    return clip(threshold > 0 ? e.x + (d < 0 ? -size : size) : at, e.lo, e.hi);
  }
};

// The nearest point of ball and box. The L1 norm of the result falls with the threshold, piece by
// linear piece. Newton's step, the root of the piece at hand, ends the search where it stays on the
// piece; it is replaced by a bisection where it leaves the bracket, or where the last one did not
// halve it.
template <class C, class Row, class V>
PYADV_HD L1Clip<C, V> l1_box_clip(const Row& row, const V& v, C eps) {
  double total[2];  // |d| of the free entries and the room of the held ones; number of free ones
  const auto pass = [&](C threshold) PYADV_INLINE_LAMBDA {
    row.template sums<2, C>(
        [&](const Element<C>& e, C(&s)[2]) PYADV_INLINE_LAMBDA {
          const C d = v(e) - e.x, size = magnitude(d), rest = size - threshold, most = room(e, d);
          const bool held = rest >= most, free = rest > 0 && !held;
          s[0] = held ? most : free ? size : C(0);
          s[1] = free ? C(1) : C(0);
        },
        total);
  };
  C threshold = 0;
  pass(threshold);
  if (!(total[0] > eps)) return {v, threshold};
  C low = 0, high = row.maximum([&](const Element<C>& e)
                                    PYADV_INLINE_LAMBDA { return magnitude(v(e) - e.x); });
  for (bool bisect = false;;) {
    const C root = static_cast<C>((total[0] - eps) / total[1]);
    if (root == threshold) break;
    bisect = bisect || !(root > low && root < high);
    const C next = bisect ? low + (high - low) / 2 : root;
    threshold = high;
    if (!(next > low && next < high)) break;  // neighbours: the side inside the ball
    threshold = next;
    pass(threshold);
    const C width = high - low;
    (total[0] - total[1] * threshold > eps ? low : high) = threshold;
    bisect = !bisect && high - low > width / 2;
  }
  return {v, threshold};
}

// The rules, as the traversals take them: elementwise `apply`, on rows `run`.
template <class C>
struct Iterate {
  PYADV_HD C operator()(const Element<C>& e) const { return e.a; }
};

struct LinfProject {
  static constexpr bool kGrad = false, kPrev = false;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const Sizes<C>& s) {
    return linf_clip(e.a, e, s.eps);
  }
};

struct L2Project {
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    row.store(l2_clip<C>(row, Iterate<C>{}, s.eps));
  }
};

struct L2BoxProject {
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    row.store(l2_box_clip<C>(row, Iterate<C>{}, s.eps));
  }
};

struct L1Project {
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    row.store(l1_box_clip<C>(row, Iterate<C>{}, s.eps));
  }
};

}  // namespace pyadv
