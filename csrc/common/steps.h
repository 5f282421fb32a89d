// Steps: x_adv -> the next iterate, inside the eps-ball around x and inside the box [lo, hi].
// Specification: pyadv/reference/steps.py. common/rules.h explains rules and rows.
#pragma once

#include "common/projections.h"

namespace pyadv {

// alpha: step size; eps: radius of the ball.
template <class P>
struct StepParams {
  P alpha, eps;

  template <class Q, class F>
  PYADV_HD StepParams<Q> map(const F& f) const {
    return {f(alpha), f(eps)};
  }
};

// momentum: weight of the new step; the rest goes to the previous one.
template <class P>
struct MomentumParams {
  P alpha, eps, momentum;

  template <class Q, class F>
  PYADV_HD MomentumParams<Q> map(const F& f) const {
    return {f(alpha), f(eps), f(momentum)};
  }
};

// keep: fraction of a row's entries that move.
template <class P>
struct SparseParams {
  P alpha, eps, keep;

  template <class Q, class F>
  PYADV_HD SparseParams<Q> map(const F& f) const {
    return {f(alpha), f(eps), f(keep)};
  }
};

// value: the linear function at x_adv; share: upper limit of the weight of x; overshoot: factor on
// the offset to the hyperplane.
template <class P>
struct BoundaryParams {
  P value, share, overshoot;

  template <class Q, class F>
  PYADV_HD BoundaryParams<Q> map(const F& f) const {
    return {f(value), f(share), f(overshoot)};
  }
};

using StepArgs = RuleArgs<StepParams>;
using MomentumStepArgs = RuleArgs<MomentumParams>;
using SparseStepArgs = RuleArgs<SparseParams>;
using BoundaryStepArgs = RuleArgs<BoundaryParams>;

// One square window per row of images (channels, height, width). Uniform numbers u in [0, 1) choose
// its top, its left, and a sign for each channel.
struct Window {
  const float* u;  // [rows, 2 + channels]
  int64_t side, channels, height, width;
  int64_t stride[3];  // of channel, height and width; 1 for dimensions of size 1

  PYADV_HD const float* uniforms(int64_t row) const { return u + row * (2 + channels); }
  PYADV_HD int64_t top(int64_t row) const { return corner(uniforms(row)[0], height - side); }
  PYADV_HD int64_t left(int64_t row) const { return corner(uniforms(row)[1], width - side); }
  PYADV_HD bool up(int64_t row, int64_t channel) const {
    return uniforms(row)[2 + channel] >= 0.5f;
  }

  // A place in 0 .. most, for any value of v, NaN included.
  PYADV_HD static int64_t corner(float v, int64_t most) {
    const float at = v * static_cast<float>(most + 1);
    return !(at >= 0.0f) ? 0 : at < static_cast<float>(most) ? static_cast<int64_t>(at) : most;
  }
};

struct SquareStepArgs : RuleArgs<BallParams> {
  const void* x_best;
  Window window;
};

// Copies the rows of one or two pairs of tensors where the mask is true. Rows are bytes, of any
// dtype.
struct KeepRowsArgs {
  const bool* mask;
  const void* from[2];
  void* to[2];  // the second is null if there is only one pair
  int64_t rows, row_bytes;
};

// Copies the rows whose loss is above the best loss so far, and the loss. A NaN is never better.
struct KeepBestArgs {
  DType dtype;  // of the losses
  const void* loss;
  void* best;
  KeepRowsArgs pairs;  // its mask is null

  template <class T>
  PYADV_HD bool better(int64_t row) const {
    return widen(static_cast<const T*>(loss)[row]) > widen(static_cast<const T*>(best)[row]);
  }
  template <class T>
  PYADV_HD void keep(int64_t row) const {
    if (better<T>(row)) static_cast<T*>(best)[row] = static_cast<const T*>(loss)[row];
  }
};

struct LinfStep {
  using Args = StepArgs;
  static constexpr bool kGrad = true, kPrev = false;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const StepParams<C>& p) {
    return linf_clip(e.x_adv + signed_step(e.grad, p.alpha), e, p.eps);
  }
};

// x_adv + momentum (z - x_adv) + (1 - momentum) (x_adv - x_prev).
template <class C>
PYADV_HD C with_momentum(const Element<C>& e, C z, C momentum) {
  return e.x_adv + momentum * (z - e.x_adv) + (C(1) - momentum) * (e.x_adv - e.x_prev);
}

struct LinfMomentumStep {
  using Args = MomentumStepArgs;
  static constexpr bool kGrad = true, kPrev = true;
  template <class C>
  PYADV_HD static C apply(const Element<C>& e, const MomentumParams<C>& p) {
    const C z = LinfStep::apply(e, StepParams<C>{p.alpha, p.eps});
    return linf_clip(with_momentum(e, z, p.momentum), e, p.eps);
  }
};

// Square Attack's proposal inside the window: a step of 2 eps from x_best up or down, clipped to
// the ball, always ends at the border of the ball.
struct SquareStep {
  template <class C>
  PYADV_HD static C apply(C x_best, C x, C eps, C lo, C hi, bool up) {
    const Element<C> e{x_best, up ? C(1) : C(-1), x, C(0), lo, hi};
    return LinfStep::apply(e, StepParams<C>{C(2) * eps, eps});
  }

  // At element i, with its own parameters.
  template <class T>
  PYADV_HD static T at(const SquareStepArgs& s, int64_t i, bool up) {
    using C = compute_t<T>;
    return narrow<T>(apply<C>(widen(static_cast<const T*>(s.x_best)[i]),
                              widen(static_cast<const T*>(s.x)[i]), s.params.eps.at<C>(i),
                              s.lo.at<C>(i), s.hi.at<C>(i), up));
  }
};

// x_adv + size (grad scale). `scale` brings tiny and huge gradients to ordinary size first.
template <class C>
struct AlongGradient {
  C scale, size;
  PYADV_HD C operator()(const Element<C>& e) const { return e.x_adv + e.grad * scale * size; }
};

template <class C>
struct Gradient {
  PYADV_HD C operator()(const Element<C>& e) const { return e.grad; }
};

// Sets `z` to the point alpha along the gradient, projected onto ball and box. Returns false if the
// gradient has an entry that is not finite.
//
// With d = x_adv - x and u = grad / ||grad||, one pass gives
// ||d + alpha u||^2 = d.d + 2 alpha d.u + alpha^2. Three passes are needed if a sum under- or
// overflows, or if the terms cancel and the length decides whether the row leaves the ball.
template <class C, class Row>
PYADV_HD bool l2_along_gradient(const Row& row, C alpha, C eps, L2Clip<C, AlongGradient<C>>& z) {
  double total[3];
  row.template sums<3, C>(
      [&](const Element<C>& e, C(&t)[3]) PYADV_INLINE_LAMBDA {
        const C d = e.x_adv - e.x;
        t[0] = e.grad * e.grad;
        t[1] = d * e.grad;
        t[2] = d * d;
      },
      total);
  if (is_ordinary<C>(total[0], row.size())) {
    const double step = alpha, radius = eps, size = step / sqrt(total[0]);
    const double parts = total[2] + step * step, square = parts + 2.0 * size * total[1];
    const bool cancels = !(4.0 * square > parts), far_inside = 2.0 * parts <= radius * radius;
    if (!cancels || far_inside) {
      const double length = far_inside ? 0.0 : sqrt(square);
      z = {{C(1), static_cast<C>(size)}, length > radius, static_cast<C>(radius / length)};
      return true;
    }
  }
  const Norm<C> norm = l2_norm<C>(row, Gradient<C>{});
  if (!norm.finite()) return false;
  const C size = norm.value > 0 ? alpha / norm.value : C(0);
  z = l2_clip<C>(row, AlongGradient<C>{norm.scale, size}, eps);
  return true;
}

struct L2Step {
  using Args = StepArgs;
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const StepParams<C>& p) {
    L2Clip<C, AlongGradient<C>> z;
    if (!l2_along_gradient(row, p.alpha, p.eps, z)) return row.copy_input();
    row.store(z);
  }
};

template <class C, class Z>
struct WithMomentum {
  Z z;
  C momentum;
  PYADV_HD C operator()(const Element<C>& e) const { return with_momentum(e, z(e), momentum); }
};

struct L2MomentumStep {
  using Args = MomentumStepArgs;
  static constexpr bool kGrad = true, kPrev = true;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const MomentumParams<C>& p) {
    L2Clip<C, AlongGradient<C>> z;
    if (!l2_along_gradient(row, p.alpha, p.eps, z)) return row.copy_input();
    row.store(l2_clip<C>(row, WithMomentum<C, L2Clip<C, AlongGradient<C>>>{z, p.momentum}, p.eps));
  }
};

// The smallest offset d, in Linf or L2, that moves a point onto the hyperplane grad.d = -value and
// keeps it in the box. All entries start moving at time 0, with equal speed (Linf) or with the
// speed of their slope (L2), and an entry stops where it meets the box.
template <class C, bool kL2>
struct ToHyperplane {
  bool from_x;  // the point is x, else x_adv
  C side;       // sign of the change that the linear function needs
  C unit;       // power of two that scales the largest slope to about 1
  C time;       // when the point reaches the hyperplane

  PYADV_HD C start(const Element<C>& e) const { return from_x ? e.x : e.x_adv; }
  PYADV_HD C slope(const Element<C>& e) const {
    const C s = magnitude(e.grad) * unit;
    return s > C(1e-18) ? s : C(0);
  }
  PYADV_HD C direction(const Element<C>& e) const {
    return slope(e) > 0 ? (e.grad > 0 ? side : -side) : C(0);
  }
  // Distance to the box in the direction of the move.
  PYADV_HD C limit(const Element<C>& e) const {
    const C d = direction(e), up = e.hi - start(e), down = start(e) - e.lo;
    const C left = d > 0 ? up : d < 0 ? down : C(0);
    return left > 0 ? left : C(0);
  }
  // Distance covered by `time` if there were no box.
  PYADV_HD C reach(const Element<C>& e) const { return kL2 ? time * slope(e) : time; }
  PYADV_HD C length(const Element<C>& e) const {
    const C most = limit(e), far = reach(e);
    return far < most ? far : most;
  }
  PYADV_HD C operator()(const Element<C>& e) const { return direction(e) * length(e); }
};

// Sets `way.time` and returns the length of the offset. The change of the linear function is a
// concave, piecewise linear function of time; Newton's method from 0 follows it. Entries that have
// met the box stay there, so the search ends, on the right piece.
template <bool kL2, class C, class Row>
PYADV_HD C find_hyperplane(const Row& row, double need, ToHyperplane<C, kL2>& way) {
  // Rate of change from the moving entries; change, number and squared length of the stopped ones.
  double total[4];
  double time = 0.0;
  for (double stopped = -1.0;;) {
    way.time = static_cast<C>(time);
    row.template sums<4, C>(
        [&](const Element<C>& e, C(&s)[4]) PYADV_INLINE_LAMBDA {
          const C slope = way.slope(e), most = way.limit(e);
          const bool moving = way.reach(e) < most;
          s[0] = moving ? (kL2 ? slope * slope : slope) : C(0);
          s[1] = moving ? C(0) : slope * most;
          s[2] = moving ? C(0) : C(1);
          s[3] = moving ? C(0) : most * most;
        },
        total);
    const double next = (need - total[1]) / total[0];
    if (!(total[2] > stopped && next > time)) break;
    stopped = total[2];
    time = next < Range<C>::kLargest ? next : static_cast<double>(Range<C>::kLargest);
  }
  // Where the box has stopped all entries, the square of the time may be infinite.
  const double moving = total[0] > 0 ? time * time * total[0] : 0.0;
  if (kL2) return static_cast<C>(sqrt(moving + total[3]));
  if (total[0] > 0) return way.time;
  return row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return way.length(e); });
}

// The point between x_adv and x, each moved to the hyperplane, with weight `share` on the side of
// x.
template <class C, bool kL2>
struct BetweenMovedPoints {
  ToHyperplane<C, kL2> way, way_of_x;
  C overshoot, share;
  PYADV_HD C operator()(const Element<C>& e) const {
    const C p = e.x_adv + overshoot * way(e), q = e.x + overshoot * way_of_x(e);
    return clip(share < C(0.5) ? p + share * (q - p) : q - (q - p) * (C(1) - share), e.lo, e.hi);
  }
};

// FAB's step.
template <bool kL2>
struct BoundaryStep {
  using Args = BoundaryStepArgs;
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const BoundaryParams<C>& given) {
    constexpr C kShortest = C(1e-8);
    const C largest =
        row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(e.grad); });
    if (!(largest <= Range<C>::kLargest)) return row.copy_input();
    const C unit = largest > 0 ? unit_scale(largest) : C(1);
    double change[1];  // of the scaled linear function, from x_adv to x
    row.template sums<1, C>([&](const Element<C>& e, C(&t)[1])
                                PYADV_INLINE_LAMBDA { t[0] = (e.x - e.x_adv) * (e.grad * unit); },
                            change);
    BetweenMovedPoints<C, kL2> point{};
    C length = 0, length_of_x = 0;
    // The search is long, so one copy of it serves both points.
    for (bool from_x = false;; from_x = true) {
      point.way = point.way_of_x;
      length = length_of_x;
      const double value = static_cast<double>(given.value) * unit + (from_x ? change[0] : 0.0);
      point.way_of_x = {from_x, value > 0 ? C(-1) : value < 0 ? C(1) : C(0), unit, C(0)};
      const double need = fabs(value) < Range<C>::kLargest ? fabs(value) : Range<C>::kLargest;
      const C found = find_hyperplane(row, need, point.way_of_x);
      length_of_x = found > kShortest ? found : kShortest;
      if (from_x) break;
    }
    const C share = length / (length + length_of_x);
    point.overshoot = given.overshoot;
    point.share = share < given.share ? share : given.share;
    row.store(point);
  }
};

// Moves the entries whose |grad| is at least `smallest` > 0 by `size`, up or down.
template <class C>
struct AlongLargest {
  C smallest, size;
  PYADV_HD C operator()(const Element<C>& e) const {
    return e.x_adv + (e.grad >= smallest ? size : C(0)) - (e.grad <= -smallest ? size : C(0));
  }
};

template <class C>
struct SignedBits {
  using type = int32_t;
};
template <>
struct SignedBits<double> {
  using type = int64_t;
};

// A threshold and how many |grad| reach it.
template <class C>
struct Selection {
  C smallest;
  double count;
};

// Returns the largest threshold that at least `wanted` entries reach. The bits of non-negative
// floats have the order of their values, so the search bisects on bits, alternating with an
// interpolation by the number of entries in the bracket.
template <class C, class Row>
PYADV_HD Selection<C> largest_gradients(const Row& row, double wanted, C largest) {
  using B = typename SignedBits<C>::type;
  const auto count = [&](C smallest) PYADV_INLINE_LAMBDA {
    double total[1];
    row.template sums<1, C>(
        [&](const Element<C>& e, C(&t)[1])
            PYADV_INLINE_LAMBDA { t[0] = magnitude(e.grad) >= smallest ? C(1) : C(0); },
        total);
    return total[0];
  };
  // At least `wanted` entries reach `low`, fewer reach `high`.
  B low = 0, high = bit_cast<B>(largest) + 1;
  double at_low = row.size(), at_high = 0;
  for (bool interpolate = false; high - low > 1; interpolate = !interpolate) {
    const C from = bit_cast<C>(low), to = bit_cast<C>(high);
    const double part = (at_low - wanted) / (at_low - at_high);
    B middle = interpolate ? bit_cast<B>(static_cast<C>(from + (to - from) * part))
                           : low + (high - low) / 2;
    if (!(middle > low)) middle = low + 1;
    if (!(middle < high)) middle = high - 1;
    const double reached = count(bit_cast<C>(middle));
    if (reached == wanted) return {bit_cast<C>(middle), reached};
    (reached > wanted ? low : high) = middle;
    (reached > wanted ? at_low : at_high) = reached;
  }
  if (low == 0) return {bit_cast<C>(high), at_high};  // entries that are 0 do not move
  return {bit_cast<C>(low), at_low};
}

struct L1Step {
  using Args = SparseStepArgs;
  static constexpr bool kGrad = true, kPrev = false;
  template <class C, class Row>
  PYADV_HD static void run(const Row& row, const SparseParams<C>& p) {
    const C largest =
        row.maximum([&](const Element<C>& e) PYADV_INLINE_LAMBDA { return magnitude(e.grad); });
    if (!(largest <= Range<C>::kLargest)) return row.copy_input();
    // The rank is computed in single precision, as AutoAttack does.
    const float n = static_cast<float>(row.size());
    const float below = (1.0f - static_cast<float>(p.keep)) * n;
    const double rank = below > 0 ? (below < n - 1 ? floor(static_cast<double>(below)) : n - 1) : 0;
    const Selection<C> kept = largest_gradients<C>(row, row.size() - rank, largest);
    const AlongLargest<C> moved{kept.smallest,
                                kept.count > 0 ? p.alpha / static_cast<C>(kept.count) : C(0)};
    row.store(l1_box_clip<C>(row, moved, p.eps));
  }
};

}  // namespace pyadv
