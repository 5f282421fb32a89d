// Steps: x_adv -> the next iterate, kept in the eps-ball around x and in the box [lo, hi].
// Specification: pyadv/reference/steps.py.
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace pyadv {

// One fused step on `rows` x `n` elements that lie in the same dense order in every tensor.
struct StepArgs {
  DType dtype;
  const void* x_adv;
  const void* grad;
  const void* x;
  void* out;           // may be x_adv
  Param alpha, eps, lo, hi;
  bool elementwise;    // all four parameters hold one value per element, in the order of the data
  const bool* active;  // [rows] or nullptr; rows that are not active are copied
  int64_t rows, n;
};

// min(max(a + alpha sign(g), x - eps), x + eps), then the box: exact in any precision, unlike
// x + clamp(delta).
template <class C>
struct LinfStep {
  C alpha, eps, lo, hi;
  PYADV_HD C operator()(C a, C g, C x) const {
    return clip_to_ball_and_box(a + signed_step(g, alpha), x - eps, x + eps, lo, hi);
  }
};

}  // namespace pyadv
