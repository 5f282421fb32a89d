// Instance weights: a function of each row's kappa or margin, then one normaliser for the batch.
// Formulas: pyadv/reference/weights.py. The arithmetic is double, because the batch is small and
// weights span many orders of magnitude.
#pragma once

#include "common/losses.h"
#include "common/types.h"

namespace pyadv {

enum class WeightKind { Tanh, Sigmoid, Discrete, Mail };
enum class Normalize { None, Mean, Sum, Times3 };

// A result is weight / divisor * factor + least.
struct Normaliser {
  double divisor, factor, least;
};

struct WeightArgs {
  WeightKind kind;
  Normalize normalize;
  DType dtype;           // of margin and out
  const int64_t* kappa;  // [rows]; GAIRAT
  const void* margin;    // [rows]; MAIL
  Param slope, centre;   // slope and bias of MAIL; slope and lambda of GAIRAT
  double half, steps;    // GAIRAT: the kappa at which the weight is sigma(lambda), and K
  void* out;             // [rows]
  int64_t rows;

  PYADV_HD double weight(int64_t row) const {
    if (kind == WeightKind::Mail) {
      const double m = dtype == DType::Double ? static_cast<const double*>(margin)[row]
                                              : static_cast<const float*>(margin)[row];
      return Logistic(-slope.at<double>(0) * (m - centre.at<double>(0))).sigmoid();
    }
    const double k = static_cast<double>(kappa[row]);
    if (kind == WeightKind::Discrete) return (steps + 1.0 - k) / (steps + 1.0);
    const double a = centre.at<double>(0) + (half - k) * slope.at<double>(0);
    // (1 + tanh a) / 2 = sigma(2 a)
    return Logistic(kind == WeightKind::Tanh ? 2.0 * a : a).sigmoid();
  }

  // `total` is the sum of the weights. If it is 0, every weight counts as 1.
  PYADV_HD Normaliser normaliser(double total) const {
    const double count = static_cast<double>(rows);
    const bool none = total == 0.0;
    if (normalize == Normalize::Mean) return {none ? 1.0 : total, count, none ? 1.0 : 0.0};
    if (normalize == Normalize::Sum) return {none ? 1.0 : total, 1.0, none ? 1.0 / count : 0.0};
    return {1.0, normalize == Normalize::Times3 ? 3.0 : 1.0, 0.0};
  }

  PYADV_HD void write(int64_t row, const Normaliser& n) const {
    const double w = weight(row) / n.divisor * n.factor + n.least;
    if (dtype == DType::Double)
      static_cast<double*>(out)[row] = w;
    else
      static_cast<float*>(out)[row] = static_cast<float>(w);
  }
};

}  // namespace pyadv
