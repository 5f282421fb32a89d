// Projections: converts the tensors and launches one kernel.
#pragma once

#include "common/projections.h"
#include "glue/rules.h"

namespace pyadv {

inline void linf_project(Tensor& out, const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                         const OptionalTensor& lo, const OptionalTensor& hi) {
  run_element_rule(backend::linf_project, {"linf_project", out, x_adv, x, lo, hi},
                   BallParams<Tensor>{eps});
}

inline void l2_project(Tensor& out, const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                       const OptionalTensor& lo, const OptionalTensor& hi, bool exact) {
  run_row_rule(exact ? backend::l2_box_project : backend::l2_project,
               {"l2_project", out, x_adv, x, lo, hi}, BallParams<Tensor>{eps});
}

inline void l1_project(Tensor& out, const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                       const OptionalTensor& lo, const OptionalTensor& hi) {
  run_row_rule(backend::l1_project, {"l1_project", out, x_adv, x, lo, hi}, BallParams<Tensor>{eps});
}

template <class Library>
void register_projections(Library& m) {
  register_forms<linf_project>(m, "linf_project");
  register_forms<l2_project>(m, "l2_project");
  register_forms<l1_project>(m, "l1_project");
}

}  // namespace pyadv
