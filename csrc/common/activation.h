// Affine maps with a ReLU, and their gradient. Formulas: pyadv/reference/activation.py.
#pragma once

#include "common/types.h"

namespace pyadv {

// y = relu((x + added) * scale + shift) on dense tensors of one layout. scale and shift have one
// value per channel. A null pointer stands for an absent tensor. `sum` receives x + added.
struct AffineReluArgs {
  DType dtype;
  const void* x;
  const void* added;
  Param scale, shift;
  double slope;  // of the ReLU below zero
  void* out;
  void* sum;
  int64_t total;
};

// The gradient of x: (grad + other) * relu'(y) * scale + added.
struct AffineReluBackwardArgs {
  DType dtype;
  const void* y;
  const void* grad;
  const void* other;
  const void* added;
  Param scale;
  double slope;
  void* out;
  int64_t total;
};

// Multiplies v by the slope where `sign` is not positive. A NaN in `sign` counts as positive, as in
// PyTorch. With slope 0 the result is 0 also where v is infinite.
template <class C>
PYADV_HD C below_zero(C sign, C v, C slope) {
  if (!(sign <= C(0))) return v;
  return slope == C(0) ? C(0) : v * slope;
}

}  // namespace pyadv
