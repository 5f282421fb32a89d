// Reductions over a row. Explicit lanes make them vectorise and give the same bits with every
// instruction set. Call them from a loop struct that cpu::run() dispatches (clones.h).
#pragma once

#include <algorithm>

#include "common/math.h"

namespace pyadv {
namespace cpu {

constexpr int kLanes = 32;
constexpr int64_t kFlush = 64 * kLanes;  // elements between two flushes of the lanes into double

// Computes K sums over i in [0, n) in one pass; term(i, t) sets the terms C t[K] of element i.
template <int K, class C, class Term>
PYADV_HD void sums(int64_t n, const Term& term, double (&total)[K]) {
  for (int j = 0; j < K; ++j) total[j] = 0.0;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole;) {
    C lane[K][kLanes] = {};
    for (const int64_t end = std::min(i + kFlush, whole); i < end; i += kLanes) {
      PYADV_INDEPENDENT
      for (int k = 0; k < kLanes; ++k) {
        C t[K];
        term(i + k, t);
        for (int j = 0; j < K; ++j) lane[j][k] += t[j];
      }
    }
    for (int j = 0; j < K; ++j)
      for (int k = 0; k < kLanes; ++k) total[j] += lane[j][k];
  }
  for (int64_t i = whole; i < n; ++i) {
    C t[K];
    term(i, t);
    for (int j = 0; j < K; ++j) total[j] += t[j];
  }
}

// Returns the sum of value(i) over i in [0, n).
template <class C, class Value>
PYADV_HD double sum(int64_t n, const Value& value) {
  double total[1];
  sums<1, C>(n, [&](int64_t i, C(&t)[1]) PYADV_INLINE_LAMBDA { t[0] = value(i); }, total);
  return total[0];
}

// Returns the largest value(i) over i in [0, n), at least `least`; NaN if any is NaN.
template <class C, class Value>
PYADV_HD C maximum(int64_t n, const Value& value, C least) {
  C most = least;
  const int64_t whole = n - n % kLanes;
  if (whole > 0) {  // skips the lanes for a short row
    C lane[kLanes];
    for (int k = 0; k < kLanes; ++k) lane[k] = least;
    for (int64_t i = 0; i < whole; i += kLanes) {
      PYADV_INDEPENDENT
      for (int k = 0; k < kLanes; ++k) lane[k] = nan_max(lane[k], value(i + k));
    }
    for (int k = 0; k < kLanes; ++k) most = nan_max(most, lane[k]);
  }
  for (int64_t i = whole; i < n; ++i) most = nan_max(most, value(i));
  return most;
}

}  // namespace cpu
}  // namespace pyadv
