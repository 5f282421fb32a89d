// Geometry values and early stop. Formulas: pyadv/reference/geometry.py.
#pragma once

#include "common/macros.h"

namespace pyadv {

struct TrackArgs {
  const bool* correct;  // all four arrays hold [rows]
  int64_t* kappa;
  bool* active;
  int64_t* patience;
  int64_t rows;

  PYADV_HD void operator()(int64_t row) const {
    if (!active[row]) return;
    if (correct[row])
      ++kappa[row];
    else if (patience[row] == 0)
      active[row] = false;
    else
      --patience[row];
  }
};

}  // namespace pyadv
