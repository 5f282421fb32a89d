// Soft thresholding. Specification: pyadv/reference/shrink.py.
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace pyadv {

struct ShrinkArgs {
  DType dtype;
  const void* x;    // [rows, n]
  void* out;        // may be x
  Param threshold;  // constant in a row
  int64_t rows, n;
};

struct Shrink {
  template <class C>
  PYADV_HD static C apply(C v, C threshold) {
    return v - clip(v, -threshold, threshold);
  }
};

}  // namespace pyadv
