// Projections: tensors in, one kernel launch; the binding is that of the steps.
#pragma once

#include "glue/steps.h"

namespace pyadv {

template <class Kernel>
void run_projection(Rule rule, Kernel kernel, const char* op, const Tensor& x_adv, const Tensor& x,
                    const Tensor& eps, const OptionalTensor& lo, const OptionalTensor& hi,
                    Tensor& out) {
  StepInputs in{op, x_adv, x, out, lo, hi};
  in.eps = eps;
  run_step(rule, kernel, in);
}

inline void linf_project_out(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                             const OptionalTensor& lo, const OptionalTensor& hi, Tensor out) {
  run_projection(Rule::Elements, backend::linf_project, "linf_project", x_adv, x, eps, lo, hi, out);
}

inline void l2_project_out(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                           const OptionalTensor& lo, const OptionalTensor& hi, bool exact,
                           Tensor out) {
  run_projection(Rule::Rows, exact ? backend::l2_box_project : backend::l2_project, "l2_project",
                 x_adv, x, eps, lo, hi, out);
}

inline void l1_project_out(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                           const OptionalTensor& lo, const OptionalTensor& hi, Tensor out) {
  run_projection(Rule::Rows, backend::l1_project, "l1_project", x_adv, x, eps, lo, hi, out);
}

inline Tensor linf_project(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                           const OptionalTensor& lo, const OptionalTensor& hi) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_project_out(x_adv, x, eps, lo, hi, out);
  return out;
}

inline Tensor l2_project(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                         const OptionalTensor& lo, const OptionalTensor& hi, bool exact) {
  Tensor out = torch::stable::empty_like(x_adv);
  l2_project_out(x_adv, x, eps, lo, hi, exact, out);
  return out;
}

inline Tensor l1_project(const Tensor& x_adv, const Tensor& x, const Tensor& eps,
                         const OptionalTensor& lo, const OptionalTensor& hi) {
  Tensor out = torch::stable::empty_like(x_adv);
  l1_project_out(x_adv, x, eps, lo, hi, out);
  return out;
}

template <class Library>
void register_projections(Library& m) {
  m.impl("linf_project", TORCH_BOX(&linf_project));
  m.impl("linf_project_out", TORCH_BOX(&linf_project_out));
  m.impl("l2_project", TORCH_BOX(&l2_project));
  m.impl("l2_project_out", TORCH_BOX(&l2_project_out));
  m.impl("l1_project", TORCH_BOX(&l1_project));
  m.impl("l1_project_out", TORCH_BOX(&l1_project_out));
}

}  // namespace pyadv
