// Steps: x_adv -> the next iterate, kept in the eps-ball around x and in the box [lo, hi].
// Specification: pyadv/reference/steps.py. What a rule and a row are: projections.h.
#pragma once

#include "common/projections.h"

namespace pyadv {

// Copies the rows of one or two pairs of tensors where the mask holds; any type, rows in bytes.
struct KeepRowsArgs {
  const bool* mask;
  const void* from[2];
  void* to[2];  // the second is null where there is one pair
  int64_t rows, row_bytes;
};

// The same where a row's loss is above its best, which then becomes the loss; never for NaN.
struct KeepBestArgs {
  DType dtype;  // of the losses
  const void* loss;
  void* best;
  KeepRowsArgs pairs;  // without a mask

  template <class T>
  PYADV_HD bool better(int64_t row) const {
    return widen(static_cast<const T*>(loss)[row]) > widen(static_cast<const T*>(best)[row]);
  }
  template <class T>
  PYADV_HD void keep(int64_t row) const {
    if (better<T>(row)) static_cast<T*>(best)[row] = static_cast<const T*>(loss)[row];
  }
};

// momentum on the way from the iterate to z, the rest on the way of the last step.
template <class C>
PYADV_HD C mixed(const Element<C>& e, C z, C momentum) {
  return e.a + momentum * (z - e.a) + (C(1) - momentum) * (e.a - e.prev);
}

struct LinfStep {
  static constexpr bool kGrad = true, kPrev = false;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const Sizes<C>& s) {
    return linf_clip(e.a + signed_step(e.g, s.alpha), e, s.eps);
  }
};

struct LinfMomentumStep {
  static constexpr bool kGrad = true, kPrev = true;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const Sizes<C>& s) {
    return linf_clip(mixed(e, LinfStep::apply(e, s), s.momentum), e, s.eps);
  }
};

// 2 eps from the best point along the sign of the window, which is the border of the ball.
struct SquareStep {
  template <class T>
  PYADV_HD static T apply(const StepArgs& s, int64_t i, bool positive) {
    using C = compute_t<T>;
    const C eps = s.eps.at<C>(i);
    const Element<C> e{widen(static_cast<const T*>(s.x_prev)[i]),
                       positive ? C(1) : C(-1),
                       widen(static_cast<const T*>(s.x)[i]),
                       C(0),
                       s.lo.at<C>(i),
                       s.hi.at<C>(i)};
    return narrow<T>(LinfStep::apply(e, Sizes<C>{C(2) * eps, eps, C(0), C(0)}));
  }
};

// a + size (g scale): the scale brings tiny and huge gradients to ordinary size.
template <class C>
struct AlongGradient {
  C scale, size;
  PYADV_HD C operator()(const Element<C>& e) const { return e.a + e.g * scale * size; }
};

template <class C>
struct Gradient {
  PYADV_HD C operator()(const Element<C>& e) const { return e.g; }
};

// Sets `z` to the point alpha along the gradient, in the ball and the box; false where the gradient
// has an entry that is not finite. With d = a - x and the unit gradient u, one pass gives
// ||d + alpha u||^2 = d.d + 2 alpha d.u + alpha^2. Three serve where a sum under- or overflows, or
// where the terms cancel and the result matters.
template <class C, class Row>
PYADV_HD bool l2_along_gradient(const Row& row, const Sizes<C>& s, L2Clip<C, AlongGradient<C>>& z) {
  double total[3];
  row.template sums<3, C>(
      [&](const Element<C>& e, C(&t)[3]) PYADV_INLINE_LAMBDA {
        const C d = e.a - e.x;
        t[0] = e.g * e.g;
        t[1] = d * e.g;
        t[2] = d * d;
      },
      total);
  if (is_ordinary<C>(total[0], row.size())) {
    const double alpha = s.alpha, eps = s.eps, size = alpha / sqrt(total[0]);
    const double parts = total[2] + alpha * alpha, square = parts + 2.0 * size * total[1];
    const bool cancels = !(4.0 * square > parts), far_inside = 2.0 * parts <= eps * eps;
    if (!cancels || far_inside) {
      const double length = far_inside ? 0.0 : sqrt(square);
      z = {{C(1), static_cast<C>(size)}, length > eps, static_cast<C>(eps / length)};
      return true;
    }
  }
  const Norm<C> norm = l2_norm<C>(row, Gradient<C>{});
  if (!norm.finite()) return false;
  const C size = norm.value > 0 ? s.alpha / norm.value : C(0);
  z = l2_clip<C>(row, AlongGradient<C>{norm.scale, size}, s.eps);
  return true;
}

struct L2Step {
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    L2Clip<C, AlongGradient<C>> z;
    if (!l2_along_gradient(row, s, z)) return row.keep();
    row.store(z);
  }
};

// The least offset d in a norm by which a point reaches the hyperplane g.d = -value inside the box:
// the entries set out together, at the same speed in Linf and at that of their slope in L2, and
// stop where the box ends. `unit` is a power of two that brings the largest slope to about 1.
template <class C, bool kL2>
struct ToHyperplane {
  bool from_x;
  C side, unit, time;

  PYADV_HD C start(const Element<C>& e) const { return from_x ? e.x : e.a; }
  PYADV_HD C slope(const Element<C>& e) const {
    const C s = magnitude(e.g) * unit;
    return s > C(1e-18) ? s : C(0);
  }
  PYADV_HD C direction(const Element<C>& e) const {
    return slope(e) > 0 ? (e.g > 0 ? side : -side) : C(0);
  }
  PYADV_HD C room(const Element<C>& e) const {
    const C d = direction(e), up = e.hi - start(e), down = start(e) - e.lo;
    const C left = d > 0 ? up : d < 0 ? down : C(0);
    return left > 0 ? left : C(0);
  }
  PYADV_HD C reach(const Element<C>& e) const { return kL2 ? time * slope(e) : time; }
  PYADV_HD C length(const Element<C>& e) const {
    const C most = room(e), far = reach(e);
    return far < most ? far : most;
  }
  PYADV_HD C operator()(const Element<C>& e) const { return direction(e) * length(e); }
};

// Sets `way.time`, by Newton's steps from 0, and gives the length of the way. Entries that the box
// has stopped only become more, so this ends, and on the right piece of what is gained over time.
template <bool kL2, class C, class Row>
PYADV_HD C find_hyperplane(const Row& row, double need, ToHyperplane<C, kL2>& way) {
  double total[4];  // speed of the gain; gains, number and squared length of the stopped entries
  const auto pass = [&](double time) PYADV_INLINE_LAMBDA {
    way.time = static_cast<C>(time);
    row.template sums<4, C>(
        [&](const Element<C>& e, C(&s)[4]) PYADV_INLINE_LAMBDA {
          const C slope = way.slope(e), most = way.room(e);
          const bool free = way.reach(e) < most;
          s[0] = free ? (kL2 ? slope * slope : slope) : C(0);
          s[1] = free ? C(0) : slope * most;
          s[2] = free ? C(0) : C(1);
          s[3] = free ? C(0) : most * most;
        },
        total);
  };
  double time = 0.0;
  pass(time);
  for (double stopped = -1.0; total[2] > stopped; pass(time)) {
    stopped = total[2];
    const double next = (need - total[1]) / total[0];
    if (!(next > time)) break;
    time = next < Range<C>::kLargest ? next : static_cast<double>(Range<C>::kLargest);
  }
  // Where the box has stopped all entries, the square of the time may be infinite.
  const double moving = total[0] > 0 ? time * time * total[0] : 0.0;
  if (kL2) return static_cast<C>(sqrt(moving + total[3]));
  if (total[0] > 0) return way.time;
  return row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return way.length(e); });
}

template <class C, bool kL2>
struct Between {
  ToHyperplane<C, kL2> way, way_of_x;
  C overshoot, share;
  PYADV_HD C operator()(const Element<C>& e) const {
    const C p = e.a + overshoot * way(e), q = e.x + overshoot * way_of_x(e);
    return clip(share < C(0.5) ? p + share * (q - p) : q - (q - p) * (C(1) - share), e.lo, e.hi);
  }
};

// FAB's step. Its value is in `alpha`, its overshoot in `eps`, its share in `momentum`.
template <bool kL2>
struct BoundaryStep {
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    constexpr C kShortest = C(1e-8);
    const C largest =
        row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(e.g); });
    if (!(largest <= Range<C>::kLargest)) return row.keep();
    const C unit = largest > 0 ? unit_scale(largest) : C(1);
    double along[1];  // the gradient, scaled, from x_adv to x
    row.template sums<1, C>([&](const Element<C>& e, C(&t)[1])
                                PYADV_INLINE_LAMBDA { t[0] = (e.x - e.a) * (e.g * unit); },
                            along);
    const auto to = [&](double value, bool from_x, ToHyperplane<C, kL2>& way) PYADV_INLINE_LAMBDA {
      way = {from_x, value > 0 ? C(-1) : value < 0 ? C(1) : C(0), unit, C(0)};
      const double need = fabs(value) < Range<C>::kLargest ? fabs(value) : Range<C>::kLargest;
      const C length = find_hyperplane(row, need, way);
      return length > kShortest ? length : kShortest;
    };
    Between<C, kL2> point;
    const double value = static_cast<double>(s.alpha) * unit;
    const C length = to(value, false, point.way);
    const C length_of_x = to(value + along[0], true, point.way_of_x);
    const C share = length / (length + length_of_x);
    point.overshoot = s.eps;
    point.share = share < s.momentum ? share : s.momentum;
    row.store(point);
  }
};

template <class C, class Z>
struct Mixed {
  Z z;
  C momentum;
  PYADV_HD C operator()(const Element<C>& e) const { return mixed(e, z(e), momentum); }
};

struct L2MomentumStep {
  static constexpr bool kGrad = true, kPrev = true;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    L2Clip<C, AlongGradient<C>> z;
    if (!l2_along_gradient(row, s, z)) return row.keep();
    row.store(l2_clip<C>(row, Mixed<C, L2Clip<C, AlongGradient<C>>>{z, s.momentum}, s.eps));
  }
};

// Moves the entries of at least `smallest`, which is not 0.
template <class C>
struct AlongLargest {
  C smallest, size;
  PYADV_HD C operator()(const Element<C>& e) const {
    return e.a + (e.g >= smallest ? size : C(0)) - (e.g <= -smallest ? size : C(0));
  }
};

template <class C>
struct Bits {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};

// How many |g| are at least `smallest`: no other threshold with `wanted` or more is larger. Bisects
// on the bits of non-negative floats, which are in the order of the values, and by the share of the
// entries in between, in turns.
template <class C>
struct Largest {
  C smallest;
  double count;
};

template <class C, class Row>
PYADV_HD Largest<C> largest_gradients(const Row& row, double wanted, C largest) {
  using B = typename Bits<C>::type;
  const auto count = [&](C smallest) PYADV_INLINE_LAMBDA {
    double total[1];
    row.template sums<1, C>(
        [&](const Element<C>& e, C(&t)[1])
            PYADV_INLINE_LAMBDA { t[0] = magnitude(e.g) >= smallest ? C(1) : C(0); },
        total);
    return total[0];
  };
  // At least `wanted` entries reach `low`, fewer reach `high`.
  B low = 0, high = bit_cast<B>(largest) + 1;
  double at_low = row.size(), at_high = 0;
  for (bool share = false; high - low > 1; share = !share) {
    const C from = bit_cast<C>(low), to = bit_cast<C>(high);
    const double part = (at_low - wanted) / (at_low - at_high);
    B middle =
        share ? bit_cast<B>(static_cast<C>(from + (to - from) * part)) : low + (high - low) / 2;
    if (!(middle > low)) middle = low + 1;
    if (!(middle < high)) middle = high - 1;
    const double reached = count(bit_cast<C>(middle));
    if (reached == wanted) return {bit_cast<C>(middle), reached};
    (reached > wanted ? low : high) = middle;
    (reached > wanted ? at_low : at_high) = reached;
  }
  if (low == 0) return {bit_cast<C>(high), at_high};  // zeros do not move
  return {bit_cast<C>(low), at_low};
}

struct L1Step {
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const Sizes<C>& s) {
    const C largest =
        row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(e.g); });
    if (!(largest <= Range<C>::kLargest)) return row.keep();
    // The rank in single precision, as in AutoAttack.
    const float n = static_cast<float>(row.size());
    const float below = (1.0f - static_cast<float>(s.keep)) * n;
    const double rank = below > 0 ? (below < n - 1 ? floor(static_cast<double>(below)) : n - 1) : 0;
    const Largest<C> kept = largest_gradients<C>(row, row.size() - rank, largest);
    const AlongLargest<C> moved{kept.smallest,
                                kept.count > 0 ? s.alpha / static_cast<C>(kept.count) : C(0)};
    row.store(l1_box_clip<C>(row, moved, s.eps));
  }
};

}  // namespace pyadv
