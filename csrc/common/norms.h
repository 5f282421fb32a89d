// Frobenius norms of a list of tensors. Formulas: pyadv/reference/norms.py.
//
// The tensors are cut into pieces of kNormPiece elements. Two kernels: the sum of squares of every
// piece, then for every tensor the root of the sum of its pieces, in order.
#pragma once

#include "common/types.h"

namespace pyadv {

constexpr int kNormTensors =
    96;  // of one launch: the table is a kernel argument, 4096 bytes at most
constexpr int64_t kNormPiece = 32768;

struct NormArgs {
  DType dtype;
  int64_t tensors;
  double* partial;        // [pieces]
  void* norms;            // [tensors] of the compute type, as cotangent
  const void* cotangent;  // backward: of the norms
  const void* data[kNormTensors];
  void* grad[kNormTensors];         // backward
  int64_t size[kNormTensors];       // elements
  int64_t first[kNormTensors + 1];  // piece; the last entry is the number of all pieces

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

  // d norm / d w = w / norm, times this; a zero tensor has gradient 0.
  template <class C>
  PYADV_HD C scale(int64_t tensor) const {
    const C norm = static_cast<const C*>(norms)[tensor];
    return norm == C(0) ? C(0) : static_cast<const C*>(cotangent)[tensor] / norm;
  }
};

}  // namespace pyadv
