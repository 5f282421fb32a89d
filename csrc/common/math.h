// min, max and sign with PyTorch's NaN rules: min and max keep a NaN, sign(NaN) is 0.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace pyadv {

// gcc vectorises this form; it leaves the symmetric form (a > b || a != a) scalar.
template <class C>
PYADV_HD C nan_max(C a, C b) {
  return b >= a ? b : (b != b ? b : a);
}

template <class C>
PYADV_HD C nan_min(C a, C b) {
  return b <= a ? b : (b != b ? b : a);
}

template <class C>
PYADV_HD C magnitude(C v) {
  return std::fabs(v);
}

// alpha sign(g). The result is 0 if g is 0 or NaN, even for an infinite alpha.
template <class C>
PYADV_HD C signed_step(C g, C alpha) {
  return (g > C(0) ? alpha : C(0)) - (g < C(0) ? alpha : C(0));
}

template <class C>
PYADV_HD C clip(C v, C low, C high) {
  return nan_min(nan_max(v, low), high);
}

// clip(clip(v, low, high), lo, hi), where low and high are NaN together. Each of the first four
// lines is one max or min instruction, which returns its second operand if either is NaN. That
// order keeps a NaN of low; the last three lines restore a NaN of lo, hi (outside the loop for a
// scalar box) or v.
template <class C>
PYADV_HD C clip_to_ball_and_box(C v, C low, C high, C lo, C hi) {
  C r = v > low ? v : low;
  r = r < high ? r : high;
  r = lo > r ? lo : r;
  r = hi < r ? hi : r;
  r = lo != lo ? lo : r;
  r = hi != hi ? hi : r;
  return v != v ? v : r;
}

}  // namespace pyadv
