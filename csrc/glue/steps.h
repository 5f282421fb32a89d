// Steps: tensors in, one kernel launch.
#pragma once

#include "common/steps.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kElementGrain = 32768;  // elements worth a thread

inline void linf_step_out(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                          const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                          const OptionalTensor& hi, const OptionalTensor& active, Tensor out) {
  const char* op = "linf_step";
  check_like(op, "grad", grad, x_adv);
  check_like(op, "x", x, x_adv);
  check_like(op, "out", out, x_adv);
  if (out.numel() == 0) return;
  backend::Device device(out);
  Output output(out);
  const Tensor a = in_layout_of(output.block(), x_adv), g = in_layout_of(output.block(), grad),
               c = in_layout_of(output.block(), x);
  const DType dtype = dtype_of(op, x_adv);
  Parameters parameters(op, output.block(), dtype);
  StepArgs args{};
  args.dtype = dtype;
  args.x_adv = a.const_data_ptr();
  args.grad = g.const_data_ptr();
  args.x = c.const_data_ptr();
  args.out = output.data();
  args.alpha = parameters.add(alpha);
  args.eps = parameters.add(eps);
  args.lo = parameters.add(lo, -kInfinity);
  args.hi = parameters.add(hi, kInfinity);
  args.elementwise = parameters.elementwise();
  if (args.elementwise) {
    const OptionalTensor given_alpha(alpha), given_eps(eps);
    parameters.expand({&args.alpha, &args.eps, &args.lo, &args.hi},
                      {&given_alpha, &given_eps, &lo, &hi});
  }
  const Mask mask(op, active, x_adv);
  args.active = mask.data();
  args.rows = rows_of(x_adv);
  args.n = row_size(x_adv);
  device.run(backend::linf_step, args, out.numel(), kElementGrain);
  output.finish();
}

inline Tensor linf_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                        const Tensor& alpha, const Tensor& eps, const OptionalTensor& lo,
                        const OptionalTensor& hi, const OptionalTensor& active) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_step_out(x_adv, grad, x, alpha, eps, lo, hi, active, out);
  return out;
}

template <class Library>
void register_steps(Library& m) {
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("linf_step_out", TORCH_BOX(&linf_step_out));
}

}  // namespace pyadv
