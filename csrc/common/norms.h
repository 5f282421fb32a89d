// Frobenius norms of a list of tensors. Formulas: pyadv/reference/norms.py.
//
// The tensors are cut into pieces of kNormPiece elements. The first kernel sums the squares of each
// piece; the second adds the pieces of each tensor, in order, and takes the root.
#pragma once

#include "common/types.h"

namespace pyadv {

// Tensors per launch. The table is a kernel argument, which has at most 4096 bytes.
constexpr int kNormTensors = 96;
constexpr int64_t kNormPiece = 32768;

struct NormArgs {
  DType dtype;
  int64_t tensors;
  double* partial;        // [pieces]
  void* norms;            // [tensors], compute type
  const void* cotangent;  // backward: of the norms, [tensors], compute type
  const void* data[kNormTensors];
  void* grad[kNormTensors];         // backward
  int64_t size[kNormTensors];       // elements
  int64_t first[kNormTensors + 1];  // first piece of each tensor; last entry: number of pieces

  struct Piece {
    int64_t tensor, begin, end;
  };

  PYADV_HD Piece piece(int64_t i) const {
    int64_t low = 0, high = tensors;  // first[low] <= i < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first[middle] <= i)
        low = middle;
      else
        high = middle;
    }
    const int64_t begin = (i - first[low]) * kNormPiece, rest = size[low] - begin;
    return {low, begin, begin + (rest < kNormPiece ? rest : kNormPiece)};
  }

  PYADV_HD double sum_of(int64_t tensor) const {
    double sum = 0.0;
    for (int64_t i = first[tensor]; i < first[tensor + 1]; ++i) sum += partial[i];
    return sum;
  }

  // The factor of w in the gradient: cotangent / norm, or 0 for a zero tensor.
  template <class C>
  PYADV_HD C scale(int64_t tensor) const {
    const C norm = static_cast<const C*>(norms)[tensor];
    return norm == C(0) ? C(0) : static_cast<const C*>(cotangent)[tensor] / norm;
  }
};

}  // namespace pyadv
