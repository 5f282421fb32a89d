// Steps: tensors in, one kernel launch. Projections (projections.h) bind the same way.
#pragma once

#include "common/steps.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kElementGrain = 32768;  // elements worth a thread

// What steps and projections take, as they come; what an op lacks stays empty.
struct StepInputs {
  const char* op;
  const Tensor& x_adv;
  const Tensor& x;
  Tensor& out;
  const OptionalTensor& lo;
  const OptionalTensor& hi;
  OptionalTensor grad = std::nullopt, x_prev = std::nullopt;
  OptionalTensor alpha = std::nullopt, eps = std::nullopt, momentum = std::nullopt,
                 keep = std::nullopt, active = std::nullopt;
};

enum class Rule { Elements, Rows };

// Brings the tensors into one layout and runs the kernel of an elementwise rule, or of one on rows.
template <class Kernel>
void run_step(Rule rule, Kernel kernel, const StepInputs& in) {
  const auto check = [&](const char* name, const OptionalTensor& t) {
    if (t.has_value()) check_like(in.op, name, *t, in.x_adv);
  };
  check("x", in.x);
  check("grad", in.grad);
  check("x_prev", in.x_prev);
  check("out", in.out);
  StepArgs args{};
  args.dtype = dtype_of(in.op, in.x_adv);
  args.rows = rows_of(in.x_adv);
  args.n = row_size(in.x_adv);
  const Mask mask(in.op, in.active, in.x_adv);
  args.active = mask.data();
  if (in.out.numel() == 0) return;

  backend::Device device(in.out);
  Output output(in.out);
  std::vector<Tensor> kept;
  const auto data = [&](const OptionalTensor& t) -> const void* {
    if (!t.has_value()) return nullptr;
    kept.push_back(in_layout_of(output.block(), *t));
    return kept.back().const_data_ptr();
  };
  args.x_adv = data(in.x_adv);
  args.grad = data(in.grad);
  args.x = data(in.x);
  args.x_prev = data(in.x_prev);
  args.out = output.data();

  Parameters parameters(in.op, output.block(), args.dtype);
  args.alpha = parameters.add(in.alpha);
  args.eps = parameters.add(in.eps);
  args.momentum = parameters.add(in.momentum);
  args.keep = parameters.add(in.keep);
  args.lo = parameters.add(in.lo, -kInfinity);
  args.hi = parameters.add(in.hi, kInfinity);
  for (const Param* p : {&args.momentum, &args.keep, &args.alpha, &args.eps})
    STD_TORCH_CHECK(
        parameters.constant_in_rows(*p) || (rule == Rule::Elements && p != &args.momentum), in.op,
        ": a parameter must be one number or hold one per sample");
  if (rule == Rule::Rows) {
    args.elementwise =
        !parameters.constant_in_rows(args.lo) || !parameters.constant_in_rows(args.hi);
    if (args.elementwise) parameters.expand({&args.lo, &args.hi}, {&in.lo, &in.hi});
    const int64_t grain = std::max<int64_t>(1, kElementGrain / args.n);
    device.run(kernel, args, args.rows, grain);
  } else {
    args.elementwise = parameters.elementwise();
    if (args.elementwise)
      parameters.expand({&args.alpha, &args.eps, &args.lo, &args.hi},
                        {&in.alpha, &in.eps, &in.lo, &in.hi});
    device.run(kernel, args, in.out.numel(), kElementGrain);
  }
  output.finish();
}

template <class Kernel>
void run_step(Rule rule, Kernel kernel, const char* op, const Tensor& x_adv, const Tensor& grad,
              const Tensor& x, const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
              const OptionalTensor& hi, const OptionalTensor& active, Tensor& out,
              const OptionalTensor& x_prev = std::nullopt,
              const OptionalTensor& momentum = std::nullopt,
              const OptionalTensor& keep = std::nullopt) {
  StepInputs in{op, x_adv, x, out, lo, hi};
  in.grad = grad;
  in.x_prev = x_prev;
  in.alpha = alpha;
  in.eps = eps;
  in.momentum = momentum;
  in.keep = keep;
  in.active = active;
  run_step(rule, kernel, in);
}

inline void linf_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                          const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                          const OptionalTensor& hi, const OptionalTensor& active, Tensor out) {
  run_step(Rule::Elements, backend::linf_step, "linf_step", x_adv, grad, x, alpha, eps, lo, hi,
           active, out);
}

inline void l2_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                        const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                        const OptionalTensor& hi, const OptionalTensor& active, Tensor out) {
  run_step(Rule::Rows, backend::l2_step, "l2_step", x_adv, grad, x, alpha, eps, lo, hi, active,
           out);
}

inline void l1_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                        const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                        const OptionalTensor& hi, const OptionalTensor& active, const Tensor& keep,
                        Tensor out) {
  run_step(Rule::Rows, backend::l1_step, "l1_step", x_adv, grad, x, alpha, eps, lo, hi, active, out,
           std::nullopt, std::nullopt, keep);
}

inline void linf_momentum_step_out(const Tensor& x_adv, const Tensor& x_prev, const Tensor& grad,
                                   const Tensor& x, const Tensor& alpha, const Tensor& eps,
                                   const Tensor& momentum, const OptionalTensor& lo,
                                   const OptionalTensor& hi, const OptionalTensor& active,
                                   Tensor out) {
  run_step(Rule::Elements, backend::linf_momentum_step, "linf_momentum_step", x_adv, grad, x, alpha,
           eps, lo, hi, active, out, x_prev, momentum);
}

inline void l2_momentum_step_out(const Tensor& x_adv, const Tensor& x_prev, const Tensor& grad,
                                 const Tensor& x, const Tensor& alpha, const Tensor& eps,
                                 const Tensor& momentum, const OptionalTensor& lo,
                                 const OptionalTensor& hi, const OptionalTensor& active,
                                 Tensor out) {
  run_step(Rule::Rows, backend::l2_momentum_step, "l2_momentum_step", x_adv, grad, x, alpha, eps,
           lo, hi, active, out, x_prev, momentum);
}

inline Tensor linf_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                        const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                        const OptionalTensor& hi, const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_step_out(x_adv, grad, x, alpha, eps, lo, hi, active, out);
  return out;
}

inline Tensor l2_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
                      const Tensor& eps, const OptionalTensor& lo, const OptionalTensor& hi,
                      const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  l2_step_out(x_adv, grad, x, alpha, eps, lo, hi, active, out);
  return out;
}

inline Tensor l1_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
                      const Tensor& eps, const OptionalTensor& lo, const OptionalTensor& hi,
                      const OptionalTensor& active, const Tensor& keep) {
  Tensor out = torch::stable::empty_like(x_adv);
  l1_step_out(x_adv, grad, x, alpha, eps, lo, hi, active, keep, out);
  return out;
}

inline Tensor linf_momentum_step(const Tensor& x_adv, const Tensor& x_prev, const Tensor& grad,
                                 const Tensor& x, const Tensor& alpha, const Tensor& eps,
                                 const Tensor& momentum, const OptionalTensor& lo,
                                 const OptionalTensor& hi, const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_momentum_step_out(x_adv, x_prev, grad, x, alpha, eps, momentum, lo, hi, active, out);
  return out;
}

inline Tensor l2_momentum_step(const Tensor& x_adv, const Tensor& x_prev, const Tensor& grad,
                               const Tensor& x, const Tensor& alpha, const Tensor& eps,
                               const Tensor& momentum, const OptionalTensor& lo,
                               const OptionalTensor& hi, const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  l2_momentum_step_out(x_adv, x_prev, grad, x, alpha, eps, momentum, lo, hi, active, out);
  return out;
}

inline void keep_rows(const Tensor& mask, const Tensor& x, const Tensor& grad, Tensor x_best,
                      Tensor grad_best) {
  const char* op = "keep_rows_";
  check_like(op, "grad", grad, x);
  check_like(op, "x_best", x_best, x);
  check_like(op, "grad_best", grad_best, x);
  const Mask rows(op, mask, x);
  if (x.numel() == 0) return;
  backend::Device device(x);
  Output best(x_best, Output::Content::Kept), best_grad(grad_best, Output::Content::Kept);
  const Tensor from = in_layout_of(best.block(), x),
               from_grad = in_layout_of(best_grad.block(), grad);
  KeepRowsArgs args{};
  args.mask = rows.data();
  args.from[0] = from.const_data_ptr();
  args.from[1] = from_grad.const_data_ptr();
  args.to[0] = best.data();
  args.to[1] = best_grad.data();
  args.rows = rows_of(x);
  args.row_bytes = row_size(x) * static_cast<int64_t>(x.element_size());
  device.run(backend::keep_rows, args, args.rows,
             std::max<int64_t>(1, kElementGrain / row_size(x)));
  best.finish();
  best_grad.finish();
}

template <class Library>
void register_steps(Library& m) {
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("linf_step_out", TORCH_BOX(&linf_step_out));
  m.impl("l2_step", TORCH_BOX(&l2_step));
  m.impl("l2_step_out", TORCH_BOX(&l2_step_out));
  m.impl("l1_step", TORCH_BOX(&l1_step));
  m.impl("l1_step_out", TORCH_BOX(&l1_step_out));
  m.impl("linf_momentum_step", TORCH_BOX(&linf_momentum_step));
  m.impl("linf_momentum_step_out", TORCH_BOX(&linf_momentum_step_out));
  m.impl("l2_momentum_step", TORCH_BOX(&l2_momentum_step));
  m.impl("l2_momentum_step_out", TORCH_BOX(&l2_momentum_step_out));
  m.impl("keep_rows_", TORCH_BOX(&keep_rows));
}

}  // namespace pyadv
