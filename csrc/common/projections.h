// Projections onto a norm ball around x and onto the box [lo, hi].
// Specification: pyadv/reference/projections.py.
#pragma once

#include <cmath>
#include <limits>

#include "common/rules.h"

namespace pyadv {

// eps: radius of the ball.
template <class P>
struct BallParams {
  P eps;

  template <class Q, class F>
  PYADV_HD BallParams<Q> map(const F& f) const {
    return {f(eps)};
  }
};

using ProjectionArgs = RuleArgs<BallParams>;

// min(max(v, x - eps), x + eps), then the box. This is exact in any precision; x + clamp(v - x)
// would round.
template <class C>
PYADV_HD C linf_clip(C v, const Element<C>& e, C eps) {
  return clip_to_ball_and_box(v, e.x - eps, e.x + eps, e.lo, e.hi);
}

// Limits as constants: device code cannot call the functions of numeric_limits.
template <class C>
struct Range {
  static constexpr C kSmallest = std::numeric_limits<C>::min();  // smallest normal number
  static constexpr C kLargest = std::numeric_limits<C>::max();
  static constexpr int kExponent = std::numeric_limits<C>::max_exponent;
};

// A row's norm is value / scale. `scale` is a power of two, and 1 for rows of ordinary size.
template <class C>
struct Norm {
  C value, scale;
  PYADV_HD bool finite() const { return value <= Range<C>::kLargest; }
};

// The largest power of two that scales `largest` > 0 to about 1 and is a normal number.
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

// Whether a sum of n squares in type C lost nothing to underflow or overflow.
template <class C>
PYADV_HD bool is_ordinary(double sum, int64_t n) {
  return sum > 64.0 * static_cast<double>(Range<C>::kSmallest) * static_cast<double>(n) &&
         sum <= Range<C>::kLargest;
}

// L2 norm of f over a row. Only rows whose squares under- or overflow need a second, scaled pass.
template <class C, class Row, class F>
PYADV_HD Norm<C> l2_norm(const Row& row, const F& f) {
  C scale = C(1);
  for (bool scaled = false;; scaled = true) {
    const double total = sum_of_squares<C>(row, f, scale);
    if (scaled || is_ordinary<C>(total, row.size())) return {static_cast<C>(sqrt(total)), scale};
    const C largest =
        row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(f(e)); });
    if (!(largest > 0 && largest <= Range<C>::kLargest)) return {largest, C(1)};
    scale = unit_scale(largest);
  }
}

// The point v(element), scaled towards x by `shrink` if `outside`, then clipped to the box.
template <class C, class V>
struct L2Clip {
  V v;
  bool outside;  // the row lies outside the ball
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

// Distance from x to the side of the box that lies in direction d; 0 if x is outside.
template <class C>
PYADV_HD C distance_to_box(const Element<C>& e, C d) {
  const C left = d > 0 ? e.hi - e.x : e.x - e.lo;
  return left > 0 ? left : C(0);
}

// Euclidean projection onto the intersection of ball and box: x + t (v - x), clipped to the box,
// for the largest t <= 1 inside the ball. The search starts at the t of the ball alone. Each pass
// fixes the entries that the box clips at the current t and solves for the next t. The set of
// clipped entries only grows, so the search ends, at the exact solution.
template <class C, class Row, class V>
PYADV_HD L2Clip<C, V> l2_box_clip(const Row& row, const V& v, C eps) {
  const double square = static_cast<double>(eps) * eps;
  double total[3];  // squares of the free entries, squares of the clipped ones, number clipped
  // The first pass, at t = 1, tells whether the row is inside.
  double t = 1.0, clipped = -1.0;
  for (bool first = true;; first = false) {
    row.template sums<3, double>(
        [&](const Element<C>& e, double (&s)[3]) PYADV_INLINE_LAMBDA {
          const C offset = v(e) - e.x;
          const double d = offset, most = distance_to_box(e, offset);
          const bool stops = t * magnitude(d) >= most;
          s[0] = stops ? 0.0 : d * d;
          s[1] = stops ? most * most : 0.0;
          s[2] = stops ? 1.0 : 0.0;
        },
        total);
    if (first) {
      if (!(total[0] + total[1] > square)) return {v, false, C(1)};
      t = 0.0;
      continue;
    }
    const double next = sqrt((square - total[1]) / total[0]);
    if (!(total[2] > clipped && next > t)) return {v, true, static_cast<C>(t)};
    clipped = total[2];
    t = next;
  }
}

// The point v(element) with |v - x| reduced by `threshold` and limited to the distance to the box.
// A row inside the ball has threshold 0.
template <class C, class V>
struct L1Clip {
  V v;
  C threshold;
  PYADV_HD C operator()(const Element<C>& e) const {
    const C at = v(e), d = at - e.x, most = distance_to_box(e, d);
    C size = magnitude(d) - threshold;
    size = size > 0 ? size : C(0);
    size = size < most ? size : most;
    return clip(threshold > 0 ? e.x + (d < 0 ? -size : size) : at, e.lo, e.hi);
  }
};

// Euclidean projection onto the intersection of the L1 ball and the box. The L1 norm of the result
// is a piecewise linear, falling function of the threshold. A Newton step goes to the root of the
// current piece and ends the search if it stays on that piece. A bisection replaces a step that
// leaves the bracket, and follows a step that did not halve it.
template <class C, class Row, class V>
PYADV_HD L1Clip<C, V> l1_box_clip(const Row& row, const V& v, C eps) {
  // total[0]: |d| of the free entries plus the room of those the box clips; total[1]: number free.
  double total[2];
  C threshold = 0, low = 0, high = 0;
  for (bool bisect = false;;) {
    row.template sums<2, C>(
        [&](const Element<C>& e, C(&s)[2]) PYADV_INLINE_LAMBDA {
          const C d = v(e) - e.x, size = magnitude(d), rest = size - threshold,
                  most = distance_to_box(e, d);
          const bool clipped = rest >= most, free = rest > 0 && !clipped;
          s[0] = clipped ? most : free ? size : C(0);
          s[1] = free ? C(1) : C(0);
        },
        total);
    if (threshold == C(0)) {
      if (!(total[0] > eps)) return {v, threshold};
      high = row.maximum([&](const Element<C>& e)
                             PYADV_INLINE_LAMBDA { return magnitude(v(e) - e.x); });
    } else {
      const C width = high - low;
      (total[0] - total[1] * threshold > eps ? low : high) = threshold;
      bisect = !bisect && high - low > width / 2;
    }
    const C root = static_cast<C>((total[0] - eps) / total[1]);
    if (root == threshold) break;
    bisect = bisect || !(root > low && root < high);
    const C next = bisect ? low + (high - low) / 2 : root;
    threshold = high;
    if (!(next > low && next < high)) break;  // neighbouring numbers: take the one inside the ball
    threshold = next;
  }
  return {v, threshold};
}

template <class C>
struct CurrentPoint {
  PYADV_HD C operator()(const Element<C>& e) const { return e.x_adv; }
};

struct LinfProject {
  using Args = ProjectionArgs;
  static constexpr bool kGrad = false, kPrev = false;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const BallParams<C>& p) {
    return linf_clip(e.x_adv, e, p.eps);
  }
};

struct L2Project {
  using Args = ProjectionArgs;
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const BallParams<C>& p) {
    row.store(l2_clip<C>(row, CurrentPoint<C>{}, p.eps));
  }
};

struct L2BoxProject {
  using Args = ProjectionArgs;
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const BallParams<C>& p) {
    row.store(l2_box_clip<C>(row, CurrentPoint<C>{}, p.eps));
  }
};

struct L1Project {
  using Args = ProjectionArgs;
  static constexpr bool kGrad = false, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const BallParams<C>& p) {
    row.store(l1_box_clip<C>(row, CurrentPoint<C>{}, p.eps));
  }
};

}  // namespace pyadv
