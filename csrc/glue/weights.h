// Weights: converts the tensors and launches one kernel.
#pragma once

#include <string>

#include "common/weights.h"
#include "glue/tensors.h"

namespace pyadv {

inline Normalize normalize_of(const char* op, const std::string& name) {
  if (name == "none") return Normalize::None;
  if (name == "mean") return Normalize::Mean;
  if (name == "sum") return Normalize::Sum;
  STD_TORCH_CHECK(name == "x3", op, ": unknown normalize ", name);
  return Normalize::Times3;
}

inline WeightKind weight_kind_of(const char* op, const std::string& name) {
  if (name == "tanh") return WeightKind::Tanh;
  if (name == "sigmoid") return WeightKind::Sigmoid;
  STD_TORCH_CHECK(name == "discrete", op, ": unknown kind ", name);
  return WeightKind::Discrete;
}

inline Tensor gairat_weights(const Tensor& kappa, int64_t steps, const Tensor& lam,
                             const std::string& kind, const std::string& normalize,
                             std::optional<double> slope, bool int_half) {
  const char* op = "gairat_weights";
  STD_TORCH_CHECK(kappa.scalar_type() == ScalarType::Long && kappa.dim() <= 1, op,
                  ": kappa must be an int64 tensor with one value per row");
  Tensor out = torch::stable::new_empty(kappa, kappa.sizes(), ScalarType::Float);
  if (out.numel() == 0) return out;
  backend::Device device(out);
  const Tensor dense = torch::stable::contiguous(kappa);
  Parameters parameters(op, out, DType::Double);
  WeightArgs args{};
  args.kind = weight_kind_of(op, kind);
  args.normalize = normalize_of(op, normalize);
  args.dtype = DType::Float;
  args.kappa = dense.const_data_ptr<int64_t>();
  args.centre = parameters.add(lam);
  args.steps = static_cast<double>(steps);
  args.half = int_half && steps > 1 ? static_cast<double>(steps / 2) : args.steps / 2.0;
  args.slope.value = slope.value_or(5.0) / args.half;
  args.out = out.mutable_data_ptr();
  args.rows = out.numel();
  device.run(backend::weights, args, int64_t{1}, int64_t{1});
  return out;
}

inline Tensor mail_weights(const Tensor& margin, const Tensor& slope, const Tensor& bias,
                           const std::string& normalize) {
  const char* op = "mail_weights";
  const DType dtype = dtype_of(op, margin);
  STD_TORCH_CHECK(margin.dim() <= 1, op, ": margin must hold one value per row");
  const ScalarType type = compute_type(dtype);
  Tensor out = torch::stable::new_empty(margin, margin.sizes(), type);
  if (out.numel() == 0) return out;
  backend::Device device(out);
  const Tensor wide = margin.scalar_type() == type ? margin : torch::stable::to(margin, type);
  const Tensor dense = torch::stable::contiguous(wide);
  Parameters parameters(op, out, DType::Double);
  WeightArgs args{};
  args.kind = WeightKind::Mail;
  args.normalize = normalize_of(op, normalize);
  args.dtype = dtype == DType::Double ? DType::Double : DType::Float;
  args.margin = dense.const_data_ptr();
  args.slope = parameters.add(slope);
  args.centre = parameters.add(bias);
  args.out = out.mutable_data_ptr();
  args.rows = out.numel();
  device.run(backend::weights, args, int64_t{1}, int64_t{1});
  return out;
}

template <class Library>
void register_weights(Library& m) {
  m.impl("gairat_weights", TORCH_BOX(&gairat_weights));
  m.impl("mail_weights", TORCH_BOX(&mail_weights));
}

}  // namespace pyadv
