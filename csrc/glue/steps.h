// Steps: converts the tensors and launches one kernel.
#pragma once

#include "common/steps.h"
#include "glue/rules.h"

namespace pyadv {

inline void linf_step(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                      const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                      const OptionalTensor& hi, const OptionalTensor& active) {
  run_element_rule(backend::linf_step, {"linf_step", out, x_adv, x, lo, hi, active, grad},
                   StepParams<Tensor>{alpha, eps});
}

inline void l2_step(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                    const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                    const OptionalTensor& hi, const OptionalTensor& active) {
  run_row_rule(backend::l2_step, {"l2_step", out, x_adv, x, lo, hi, active, grad},
               StepParams<Tensor>{alpha, eps});
}

inline void l1_step(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                    const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                    const OptionalTensor& hi, const OptionalTensor& active, const Tensor& keep) {
  run_row_rule(backend::l1_step, {"l1_step", out, x_adv, x, lo, hi, active, grad},
               SparseParams<Tensor>{alpha, eps, keep});
}

inline void linf_momentum_step(Tensor& out, const Tensor& x_adv, const Tensor& x_prev,
                               const Tensor& grad, const Tensor& x, const Tensor& alpha,
                               const Tensor& eps, const Tensor& momentum, const OptionalTensor& lo,
                               const OptionalTensor& hi, const OptionalTensor& active) {
  run_element_rule(backend::linf_momentum_step,
                   {"linf_momentum_step", out, x_adv, x, lo, hi, active, grad, x_prev},
                   MomentumParams<Tensor>{alpha, eps, momentum});
}

inline void l2_momentum_step(Tensor& out, const Tensor& x_adv, const Tensor& x_prev,
                             const Tensor& grad, const Tensor& x, const Tensor& alpha,
                             const Tensor& eps, const Tensor& momentum, const OptionalTensor& lo,
                             const OptionalTensor& hi, const OptionalTensor& active) {
  run_row_rule(backend::l2_momentum_step,
               {"l2_momentum_step", out, x_adv, x, lo, hi, active, grad, x_prev},
               MomentumParams<Tensor>{alpha, eps, momentum});
}

inline void linf_boundary_step(Tensor& out, const Tensor& x_adv, const Tensor& grad,
                               const Tensor& x, const Tensor& value, const Tensor& share,
                               const Tensor& overshoot, const OptionalTensor& lo,
                               const OptionalTensor& hi, const OptionalTensor& active) {
  run_row_rule(backend::linf_boundary_step,
               {"linf_boundary_step", out, x_adv, x, lo, hi, active, grad},
               BoundaryParams<Tensor>{value, share, overshoot});
}

inline void l2_boundary_step(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                             const Tensor& value, const Tensor& share, const Tensor& overshoot,
                             const OptionalTensor& lo, const OptionalTensor& hi,
                             const OptionalTensor& active) {
  run_row_rule(backend::l2_boundary_step, {"l2_boundary_step", out, x_adv, x, lo, hi, active, grad},
               BoundaryParams<Tensor>{value, share, overshoot});
}

inline void square_step(Tensor& out, const Tensor& x_adv, const Tensor& x_best, const Tensor& x,
                        const Tensor& u, int64_t side, const Tensor& eps, const OptionalTensor& lo,
                        const OptionalTensor& hi, const OptionalTensor& active) {
  const char* op = "square_step";
  const RuleInputs in{op, out, x_adv, x, lo, hi, active};
  check_inputs(in);
  check_like(op, "x_best", x_best, x_adv);
  STD_TORCH_CHECK(x_adv.dim() == 4 && row_size(x_adv) <= std::numeric_limits<int32_t>::max(), op,
                  ": x_adv must be images (B, C, H, W) of less than 2^31 elements each");
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.dim() == 2 &&
                      u.size(0) == x_adv.size(0) && u.size(1) == 2 + x_adv.size(1) &&
                      u.is_cuda() == x_adv.is_cuda(),
                  op, ": u must be float32 (B, 2 + C), on the same device");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(side >= 1 && side <= std::min(x_adv.size(2), x_adv.size(3)), op,
                  ": side must be in 1 .. min(H, W)");
  SquareStepArgs args{};
  RuleCall call(in);
  call.fill(args, BallParams<Tensor>{eps}, RuleCall::Kind::Element);
  args.x_best = call.data(x_best);
  const Tensor numbers = torch::stable::contiguous(u);
  const Tensor& block = call.block();
  args.window = {
      numbers.const_data_ptr<float>(), side, block.size(1), block.size(2), block.size(3), {}};
  for (int d = 0; d < 3; ++d)
    args.window.stride[d] = block.size(d + 1) == 1 ? 1 : block.stride(d + 1);
  call.run_rows(backend::square_step, args);
}

// Prepares the pairs (x, x_best) and, if given, (grad, grad_best), and calls run(args).
template <class Run>
void copy_pairs(const char* op, const Tensor& x, const OptionalTensor& grad, const Tensor& x_best,
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
  copy_pairs(op, x, grad, x_best, grad_best, [&](KeepRowsArgs args) {
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
  copy_pairs(op, x, grad, x_best, grad_best, [&](const KeepRowsArgs& pairs) {
    Output best(loss_best, Output::Content::Kept);
    const Tensor from = in_layout_of(best.block(), loss);
    const KeepBestArgs args{dtype_of(op, loss), from.const_data_ptr(), best.data(), pairs};
    backend::Device(x).run(backend::keep_best, args, pairs.rows, row_grain(pairs));
    best.finish();
  });
}

template <class Library>
void register_steps(Library& m) {
  register_forms<linf_step>(m, "linf_step");
  register_forms<l2_step>(m, "l2_step");
  register_forms<l1_step>(m, "l1_step");
  register_forms<linf_momentum_step>(m, "linf_momentum_step");
  register_forms<l2_momentum_step>(m, "l2_momentum_step");
  register_forms<linf_boundary_step>(m, "linf_boundary_step");
  register_forms<l2_boundary_step>(m, "l2_boundary_step");
  register_forms<square_step>(m, "square_step");
  m.impl("keep_rows_", TORCH_BOX(&keep_rows));
  m.impl("keep_best_", TORCH_BOX(&keep_best));
}

}  // namespace pyadv
