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
  OptionalTensor u = std::nullopt;
  int64_t side = 0;
};

enum class Rule { Elements, Rows, Window };

// `kept` holds what the window points to.
inline Window window_of(const StepInputs& in, const Tensor& block, std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(block.dim() == 4 && row_size(block) <= std::numeric_limits<int32_t>::max(), in.op,
                  ": x_adv must be images (B, C, H, W) of less than 2^31 elements each");
  STD_TORCH_CHECK(in.u->scalar_type() == ScalarType::Float && in.u->dim() == 2 &&
                      in.u->size(0) == block.size(0) && in.u->size(1) == 2 + block.size(1) &&
                      in.u->is_cuda() == block.is_cuda(),
                  in.op, ": u must be float32 (B, 2 + C), on the same device");
  STD_TORCH_CHECK(in.side >= 1 && in.side <= std::min(block.size(2), block.size(3)), in.op,
                  ": side must be in 1 .. min(H, W)");
  kept.push_back(torch::stable::contiguous(*in.u));
  Window w{kept.back().const_data_ptr<float>(),
           in.side,
           block.size(1),
           block.size(2),
           block.size(3),
           {}};
  for (int d = 0; d < 3; ++d) w.stride[d] = block.size(d + 1) == 1 ? 1 : block.stride(d + 1);
  return w;
}

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
  if (rule == Rule::Window) args.window = window_of(in, output.block(), kept);

  Parameters parameters(in.op, output.block(), args.dtype);
  args.alpha = parameters.add(in.alpha);
  args.eps = parameters.add(in.eps);
  args.momentum = parameters.add(in.momentum);
  args.keep = parameters.add(in.keep);
  args.lo = parameters.add(in.lo, -kInfinity);
  args.hi = parameters.add(in.hi, kInfinity);
  for (const Param* p : {&args.momentum, &args.keep, &args.alpha, &args.eps})
    STD_TORCH_CHECK(parameters.constant_in_rows(*p) || (rule != Rule::Rows && p != &args.momentum),
                    in.op, ": a parameter must be one number or hold one per sample");
  if (rule == Rule::Rows) {
    args.elementwise =
        !parameters.constant_in_rows(args.lo) || !parameters.constant_in_rows(args.hi);
    if (args.elementwise) parameters.expand({&args.lo, &args.hi}, {&in.lo, &in.hi});
  } else {
    args.elementwise = parameters.elementwise();
    if (args.elementwise)
      parameters.expand({&args.alpha, &args.eps, &args.lo, &args.hi},
                        {&in.alpha, &in.eps, &in.lo, &in.hi});
  }
  if (rule == Rule::Elements)
    device.run(kernel, args, in.out.numel(), kElementGrain);
  else
    device.run(kernel, args, args.rows, std::max<int64_t>(1, kElementGrain / args.n));
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

inline void linf_boundary_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                                   const Tensor& value, const Tensor& share,
                                   const Tensor& overshoot, const OptionalTensor& lo,
                                   const OptionalTensor& hi, const OptionalTensor& active,
                                   Tensor out) {
  run_step(Rule::Rows, backend::linf_boundary_step, "linf_boundary_step", x_adv, grad, x, value,
           overshoot, lo, hi, active, out, std::nullopt, share);
}

inline Tensor linf_boundary_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                                 const Tensor& value, const Tensor& share, const Tensor& overshoot,
                                 const OptionalTensor& lo, const OptionalTensor& hi,
                                 const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_boundary_step_out(x_adv, grad, x, value, share, overshoot, lo, hi, active, out);
  return out;
}

inline void l2_boundary_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                                 const Tensor& value, const Tensor& share, const Tensor& overshoot,
                                 const OptionalTensor& lo, const OptionalTensor& hi,
                                 const OptionalTensor& active, Tensor out) {
  run_step(Rule::Rows, backend::l2_boundary_step, "l2_boundary_step", x_adv, grad, x, value,
           overshoot, lo, hi, active, out, std::nullopt, share);
}

inline Tensor l2_boundary_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                               const Tensor& value, const Tensor& share, const Tensor& overshoot,
                               const OptionalTensor& lo, const OptionalTensor& hi,
                               const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  l2_boundary_step_out(x_adv, grad, x, value, share, overshoot, lo, hi, active, out);
  return out;
}

inline void square_step_out(const Tensor& x_adv, const Tensor& x_best, const Tensor& x,
                            const Tensor& u, int64_t side, const Tensor& eps,
                            const OptionalTensor& lo, const OptionalTensor& hi,
                            const OptionalTensor& active, Tensor out) {
  StepInputs in{"square_step", x_adv, x, out, lo, hi};
  in.x_prev = x_best;
  in.eps = eps;
  in.active = active;
  in.u = u;
  in.side = side;
  run_step(Rule::Window, backend::square_step, in);
}

inline Tensor square_step(const Tensor& x_adv, const Tensor& x_best, const Tensor& x,
                          const Tensor& u, int64_t side, const Tensor& eps,
                          const OptionalTensor& lo, const OptionalTensor& hi,
                          const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  square_step_out(x_adv, x_best, x, u, side, eps, lo, hi, active, out);
  return out;
}

// The pairs (x, x_best) and, where there is one, (grad, grad_best), as kernels want them; `run`
// gets them when there is something to copy.
template <class Run>
void with_pairs(const char* op, const Tensor& x, const OptionalTensor& grad, const Tensor& x_best,
                const OptionalTensor& grad_best, Run&& run) {
  const OptionalTensor from[2] = {x, grad}, to[2] = {x_best, grad_best};
  const char* names[2] = {"x_best", "grad_best"};
  KeepRowsArgs args{};
  args.rows = rows_of(x);
  args.row_bytes = row_size(x) * static_cast<int64_t>(x.element_size());
  std::vector<Tensor> kept;
  std::vector<Output> outputs;
  for (int pair = 0; pair < 2; ++pair) {
    STD_TORCH_CHECK(from[pair].has_value() == to[pair].has_value(), op,
                    ": grad and grad_best come together");
    if (!from[pair].has_value()) continue;
    check_like(op, "grad", *from[pair], x);
    check_like(op, names[pair], *to[pair], x);
    if (x.numel() == 0) continue;
    outputs.emplace_back(*to[pair], Output::Content::Kept);
    kept.push_back(in_layout_of(outputs.back().block(), *from[pair]));
    args.from[pair] = kept.back().const_data_ptr();
    args.to[pair] = outputs.back().data();
  }
  run(args);
  for (Output& output : outputs) output.finish();
}

inline int64_t row_grain(const KeepRowsArgs& k) {
  return std::max<int64_t>(1, 4 * kElementGrain / std::max<int64_t>(k.row_bytes, 1));
}

inline void keep_rows(const Tensor& mask, const Tensor& x, const Tensor& grad, Tensor x_best,
                      Tensor grad_best) {
  const char* op = "keep_rows_";
  const Mask rows(op, mask, x);
  with_pairs(op, x, grad, x_best, grad_best, [&](KeepRowsArgs args) {
    if (x.numel() == 0) return;
    args.mask = rows.data();
    backend::Device(x).run(backend::keep_rows, args, args.rows, row_grain(args));
  });
}

inline void keep_best(const Tensor& loss, const Tensor& x, const OptionalTensor& grad,
                      Tensor loss_best, Tensor x_best, const OptionalTensor& grad_best) {
  const char* op = "keep_best_";
  STD_TORCH_CHECK(loss.dim() == 1 && loss.numel() == rows_of(x) && loss.is_cuda() == x.is_cuda(),
                  op, ": loss must have one value per row, on the same device");
  check_like(op, "loss_best", loss_best, loss);
  if (loss.numel() == 0) return;
  with_pairs(op, x, grad, x_best, grad_best, [&](const KeepRowsArgs& pairs) {
    Output best(loss_best, Output::Content::Kept);
    const Tensor from = in_layout_of(best.block(), loss);
    const KeepBestArgs args{dtype_of(op, loss), from.const_data_ptr(), best.data(), pairs};
    backend::Device(x).run(backend::keep_best, args, pairs.rows, row_grain(pairs));
    best.finish();
  });
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
  m.impl("linf_boundary_step", TORCH_BOX(&linf_boundary_step));
  m.impl("linf_boundary_step_out", TORCH_BOX(&linf_boundary_step_out));
  m.impl("l2_boundary_step", TORCH_BOX(&l2_boundary_step));
  m.impl("l2_boundary_step_out", TORCH_BOX(&l2_boundary_step_out));
  m.impl("square_step", TORCH_BOX(&square_step));
  m.impl("square_step_out", TORCH_BOX(&square_step_out));
  m.impl("keep_rows_", TORCH_BOX(&keep_rows));
  m.impl("keep_best_", TORCH_BOX(&keep_best));
}

}  // namespace pyadv
