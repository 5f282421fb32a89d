// Ops of the losses: they read tensors of logits, labels and weights, and allocate values and
// gradients. Each op launches one kernel.
#pragma once

#include <string>
#include <tuple>

#include "common/losses.h"
#include "glue/tensors.h"

namespace pyadv {

using OptionalInt = std::optional<int64_t>;

constexpr int64_t kRowGrain = 8192;  // logits that are worth starting a thread

inline int64_t row_grain(int64_t classes) {
  return std::max<int64_t>(1, kRowGrain / std::max<int64_t>(1, classes));
}

inline AttackLoss attack_loss_of(const std::string& name) {
  static constexpr std::pair<const char*, AttackLoss> kLosses[] = {
      {"ce", AttackLoss::CE},
      {"margin", AttackLoss::Margin},
      {"dlr", AttackLoss::DLR},
      {"kl", AttackLoss::KL},
      {"slm", AttackLoss::SLM},
      {"ce_targeted", AttackLoss::CETargeted},
      {"margin_targeted", AttackLoss::MarginTargeted},
      {"dlr_targeted", AttackLoss::DLRTargeted}};
  for (const auto& [known, loss] : kLosses)
    if (name == known) return loss;
  STD_TORCH_CHECK(false, "attack_loss: unknown loss ", name);
  return AttackLoss::CE;
}

// Checks tensors and converts them to the form kernels read. Keeps converted copies alive.
class LossTensors {
 public:
  LossTensors(const char* op, const Tensor& logits)
      : op_(op), like_(logits), type_(dtype_of(op, logits)) {
    STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must be two-dimensional");
  }

  DType dtype() const { return type_; }
  int64_t count() const { return like_.size(0); }
  int64_t classes() const { return like_.size(1); }

  // Rows may have any stride, also 0; the classes of a row must be adjacent.
  Logits logits(const Tensor& t) {
    check_like(op_, "logits", t, like_);
    const Tensor& dense =
        keep(t.stride(1) == 1 || t.size(1) == 1 ? t : torch::stable::contiguous(t));
    return {dense.const_data_ptr(), dense.stride(0)};
  }
  const int64_t* labels(const Tensor& t) {
    check_rows(t, ScalarType::Long);
    return keep(torch::stable::contiguous(t)).template const_data_ptr<int64_t>();
  }
  // One value per row, in the compute type.
  const void* values(const Tensor& t) {
    check_rows(t, t.scalar_type());
    return typed(t);
  }
  // One value per logit, in the compute type.
  const void* soft_labels(const Tensor& t) {
    STD_TORCH_CHECK(same_shape(t, like_) && t.is_cuda() == like_.is_cuda(), op_,
                    ": soft labels must have the shape and device of the logits");
    return typed(t);
  }

  Tensor new_values() const { return new_rows(compute_type(type_)); }
  Tensor new_rows(ScalarType type, int64_t columns = 0) const {
    return columns == 0 ? torch::stable::new_empty(like_, {count()}, type)
                        : torch::stable::new_empty(like_, {count(), columns}, type);
  }
  Tensor new_gradient() const { return torch::stable::new_empty(like_, {count(), classes()}); }

 private:
  const Tensor& keep(Tensor t) { return kept_.emplace_back(std::move(t)); }
  const void* typed(const Tensor& t) {
    const ScalarType type = compute_type(type_);
    const Tensor same = t.scalar_type() == type ? t : torch::stable::to(t, type);
    return keep(torch::stable::contiguous(same)).const_data_ptr();
  }
  void check_rows(const Tensor& t, ScalarType type) const {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count() && t.scalar_type() == type &&
                        t.is_cuda() == like_.is_cuda(),
                    op_,
                    ": needs one value per row, of the right type, on the device of the logits");
  }

  const char* op_;
  Tensor like_;
  DType type_;
  std::vector<Tensor> kept_;
};

template <class Args>
Args row_args(const LossTensors& tensors) {
  Args args{};
  args.dtype = tensors.dtype();
  args.rows = tensors.count();
  args.classes = tensors.classes();
  return args;
}

// Runs the kernel of the device. An empty batch launches nothing.
template <class Kernel, class Args>
void run_rows(Kernel kernel, const Args& args, const Tensor& on) {
  if (args.rows > 0) backend::Device(on).run(kernel, args, args.rows, row_grain(args.classes));
}

inline std::tuple<Tensor, Tensor, Tensor> attack_loss(const Tensor& logits, const Tensor& y,
                                                      const std::string& loss,
                                                      const OptionalTensor& reference_logits,
                                                      const OptionalTensor& target,
                                                      const std::string& scale) {
  LossTensors tensors("attack_loss", logits);
  Tensor value = tensors.new_values(), grad = tensors.new_gradient(),
         correct = tensors.new_rows(ScalarType::Bool);
  AttackArgs args = row_args<AttackArgs>(tensors);
  args.loss = attack_loss_of(loss);
  args.unit = scale == "unit";
  args.logits = tensors.logits(logits);
  args.y = tensors.labels(y);
  if (args.loss == AttackLoss::KL) {
    STD_TORCH_CHECK(reference_logits.has_value(), "attack_loss: kl needs reference_logits");
    args.natural = tensors.logits(*reference_logits);
  }
  if (is_targeted(args.loss)) {
    STD_TORCH_CHECK(target.has_value(), "attack_loss: ", loss, " needs target");
    args.target = tensors.labels(*target);
  }
  const int64_t least = args.loss == AttackLoss::DLRTargeted ? 4
                        : args.loss == AttackLoss::DLR       ? 3
                                                             : 2;
  STD_TORCH_CHECK(args.classes >= least, "attack_loss: ", loss, " needs more classes");
  args.value = value.mutable_data_ptr();
  args.grad = grad.mutable_data_ptr();
  args.correct = correct.mutable_data_ptr<bool>();
  run_rows(backend::attack_loss, args, logits);
  return {value, grad, correct};
}

// These allocate the results of a differentiable loss: values, gradients, or both.
template <class Kernel>
Tensor loss_values(Kernel kernel, const LossTensors& tensors, LossArgs args, const Tensor& on) {
  Tensor value = tensors.new_values();
  args.value = value.mutable_data_ptr();
  run_rows(kernel, args, on);
  return value;
}

template <class Kernel>
Tensor loss_gradient(Kernel kernel, LossTensors& tensors, LossArgs args, const Tensor& cotangent,
                     const Tensor& on) {
  Tensor grad = tensors.new_gradient();
  args.cotangent = tensors.values(cotangent);
  args.grad = grad.mutable_data_ptr();
  run_rows(kernel, args, on);
  return grad;
}

template <class Kernel>
std::tuple<Tensor, Tensor> loss_and_gradient(Kernel kernel, const LossTensors& tensors,
                                             LossArgs args, const Tensor& on) {
  Tensor grad = tensors.new_gradient();
  args.grad = grad.mutable_data_ptr();
  return {loss_values(kernel, tensors, args, on), grad};
}

// Variants for losses of two tensors of logits.
template <class Kernel>
std::tuple<Tensor, Tensor> loss_gradients(Kernel kernel, LossTensors& tensors, LossArgs args,
                                          const Tensor& cotangent, const Tensor& on) {
  Tensor grad_natural = tensors.new_gradient();
  args.grad_natural = grad_natural.mutable_data_ptr();
  return {loss_gradient(kernel, tensors, args, cotangent, on), grad_natural};
}

template <class Kernel>
std::tuple<Tensor, Tensor, Tensor> loss_and_gradients(Kernel kernel, const LossTensors& tensors,
                                                      LossArgs args, const Tensor& on) {
  Tensor grad_natural = tensors.new_gradient();
  args.grad_natural = grad_natural.mutable_data_ptr();
  auto [value, grad] = loss_and_gradient(kernel, tensors, args, on);
  return {value, grad, grad_natural};
}

inline LossArgs cross_entropy_args(LossTensors& tensors, const Tensor& logits, const Tensor& y,
                                   const OptionalTensor& weight, const OptionalInt& ignore_index) {
  LossArgs args = row_args<LossArgs>(tensors);
  args.logits = tensors.logits(logits);
  if (y.dim() == 2)
    args.soft = tensors.soft_labels(y);
  else
    args.y = tensors.labels(y);
  if (weight.has_value()) args.weight = tensors.values(*weight);
  args.ignores = ignore_index.has_value();
  args.ignored = ignore_index.value_or(0);
  return args;
}

inline Tensor weighted_cross_entropy(const Tensor& logits, const Tensor& y,
                                     const OptionalTensor& weight,
                                     const OptionalInt& ignore_index) {
  LossTensors tensors("weighted_cross_entropy", logits);
  return loss_values(backend::weighted_cross_entropy, tensors,
                     cross_entropy_args(tensors, logits, y, weight, ignore_index), logits);
}

inline Tensor weighted_cross_entropy_backward(const Tensor& grad, const Tensor& logits,
                                              const Tensor& y, const OptionalTensor& weight,
                                              const OptionalInt& ignore_index) {
  LossTensors tensors("weighted_cross_entropy", logits);
  return loss_gradient(backend::weighted_cross_entropy, tensors,
                       cross_entropy_args(tensors, logits, y, weight, ignore_index), grad, logits);
}

inline std::tuple<Tensor, Tensor> weighted_cross_entropy_and_gradient(
    const Tensor& logits, const Tensor& y, const OptionalTensor& weight,
    const OptionalInt& ignore_index) {
  LossTensors tensors("weighted_cross_entropy", logits);
  return loss_and_gradient(backend::weighted_cross_entropy, tensors,
                           cross_entropy_args(tensors, logits, y, weight, ignore_index), logits);
}

inline LossArgs kl_args(LossTensors& tensors, const Tensor& logits_adv, const Tensor& logits) {
  LossArgs args = row_args<LossArgs>(tensors);
  args.logits = tensors.logits(logits_adv);
  args.natural = tensors.logits(logits);
  return args;
}

inline Tensor trades_kl(const Tensor& logits_adv, const Tensor& logits) {
  LossTensors tensors("trades_kl", logits_adv);
  return loss_values(backend::kl, tensors, kl_args(tensors, logits_adv, logits), logits_adv);
}

inline std::tuple<Tensor, Tensor> trades_kl_backward(const Tensor& grad, const Tensor& logits_adv,
                                                     const Tensor& logits) {
  LossTensors tensors("trades_kl", logits_adv);
  return loss_gradients(backend::kl, tensors, kl_args(tensors, logits_adv, logits), grad,
                        logits_adv);
}

inline std::tuple<Tensor, Tensor, Tensor> trades_kl_and_gradient(const Tensor& logits_adv,
                                                                 const Tensor& logits) {
  LossTensors tensors("trades_kl", logits_adv);
  return loss_and_gradients(backend::kl, tensors, kl_args(tensors, logits_adv, logits), logits_adv);
}

inline LossArgs mart_kl_args(LossTensors& tensors, const Tensor& logits_adv, const Tensor& logits,
                             const Tensor& y, bool exact, bool detach_weight) {
  LossArgs args = kl_args(tensors, logits_adv, logits);
  args.y = tensors.labels(y);
  args.exact = exact;
  args.detached = detach_weight;
  return args;
}

inline Tensor mart_kl(const Tensor& logits_adv, const Tensor& logits, const Tensor& y, bool exact,
                      bool detach_weight) {
  LossTensors tensors("mart_kl", logits_adv);
  return loss_values(backend::kl, tensors,
                     mart_kl_args(tensors, logits_adv, logits, y, exact, detach_weight),
                     logits_adv);
}

inline std::tuple<Tensor, Tensor> mart_kl_backward(const Tensor& grad, const Tensor& logits_adv,
                                                   const Tensor& logits, const Tensor& y,
                                                   bool exact, bool detach_weight) {
  LossTensors tensors("mart_kl", logits_adv);
  return loss_gradients(backend::kl, tensors,
                        mart_kl_args(tensors, logits_adv, logits, y, exact, detach_weight), grad,
                        logits_adv);
}

inline std::tuple<Tensor, Tensor, Tensor> mart_kl_and_gradient(const Tensor& logits_adv,
                                                               const Tensor& logits,
                                                               const Tensor& y, bool exact,
                                                               bool detach_weight) {
  LossTensors tensors("mart_kl", logits_adv);
  return loss_and_gradients(backend::kl, tensors,
                            mart_kl_args(tensors, logits_adv, logits, y, exact, detach_weight),
                            logits_adv);
}

inline LossArgs mart_bce_args(LossTensors& tensors, const Tensor& logits_adv, const Tensor& y,
                              bool exact) {
  LossArgs args = row_args<LossArgs>(tensors);
  args.logits = tensors.logits(logits_adv);
  args.y = tensors.labels(y);
  args.exact = exact;
  return args;
}

inline Tensor mart_bce(const Tensor& logits_adv, const Tensor& y, bool exact) {
  LossTensors tensors("mart_bce", logits_adv);
  return loss_values(backend::mart_bce, tensors, mart_bce_args(tensors, logits_adv, y, exact),
                     logits_adv);
}

inline Tensor mart_bce_backward(const Tensor& grad, const Tensor& logits_adv, const Tensor& y,
                                bool exact) {
  LossTensors tensors("mart_bce", logits_adv);
  return loss_gradient(backend::mart_bce, tensors, mart_bce_args(tensors, logits_adv, y, exact),
                       grad, logits_adv);
}

inline std::tuple<Tensor, Tensor> mart_bce_and_gradient(const Tensor& logits_adv, const Tensor& y,
                                                        bool exact) {
  LossTensors tensors("mart_bce", logits_adv);
  return loss_and_gradient(backend::mart_bce, tensors, mart_bce_args(tensors, logits_adv, y, exact),
                           logits_adv);
}

inline Tensor softmax_cotangent(const Tensor& logits, double temperature, bool center) {
  LossTensors tensors("softmax_cotangent", logits);
  Tensor out = tensors.new_gradient();
  SoftmaxArgs args = row_args<SoftmaxArgs>(tensors);
  args.logits = tensors.logits(logits);
  args.temperature = temperature;
  args.center = center;
  args.out = out.mutable_data_ptr();
  run_rows(backend::softmax_cotangent, args, logits);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats(const Tensor& logits,
                                                                    const Tensor& y) {
  LossTensors tensors("row_stats", logits);
  STD_TORCH_CHECK(tensors.classes() >= 2, "row_stats: needs at least 2 classes");
  Tensor runner_up = tensors.new_rows(ScalarType::Long), margin = tensors.new_values(),
         prob_margin = tensors.new_values(),
         top = tensors.new_rows(compute_type(tensors.dtype()), 4),
         top_index = tensors.new_rows(ScalarType::Long, 4);
  RowStatsArgs args = row_args<RowStatsArgs>(tensors);
  args.logits = tensors.logits(logits);
  args.y = tensors.labels(y);
  args.runner_up = runner_up.mutable_data_ptr<int64_t>();
  args.margin = margin.mutable_data_ptr();
  args.prob_margin = prob_margin.mutable_data_ptr();
  args.top = top.mutable_data_ptr();
  args.top_index = top_index.mutable_data_ptr<int64_t>();
  run_rows(backend::row_stats, args, logits);
  return {runner_up, margin, prob_margin, top, top_index};
}

inline SquareArgs square_args(const Tensor& g, const Tensor& dense, void* out) {
  STD_TORCH_CHECK(g.dim() > 0, "row_square_sum: needs a batch dimension");
  return {
      dtype_of("row_square_sum", g), dense.const_data_ptr(), nullptr, out, rows_of(g), row_size(g)};
}

inline Tensor row_square_sum(const Tensor& g) {
  const Tensor dense = has_dense_rows(g) ? g : torch::stable::contiguous(g);
  Tensor out =
      torch::stable::new_empty(dense, {rows_of(g)}, compute_type(dtype_of("row_square_sum", g)));
  const SquareArgs args = square_args(g, dense, out.mutable_data_ptr());
  if (args.rows > 0)
    backend::Device(g).run(backend::row_square_sum, args, args.rows, row_grain(args.n));
  return out;
}

inline Tensor row_square_sum_backward(const Tensor& grad, const Tensor& g) {
  Tensor result = torch::stable::empty_like(g);
  if (g.numel() == 0) return result;
  Output output(result);
  const Tensor dense = in_layout_of(output.block(), g);
  SquareArgs args = square_args(g, dense, output.data());
  const Tensor scale = torch::stable::contiguous(torch::stable::to(grad, compute_type(args.dtype)));
  STD_TORCH_CHECK(scale.numel() == args.rows && scale.is_cuda() == g.is_cuda(),
                  "row_square_sum: the gradient needs one value per row");
  args.cotangent = scale.const_data_ptr();
  backend::Device(g).run(backend::row_square_sum, args, args.rows, row_grain(args.n));
  output.finish();
  return result;
}

template <class Library>
void register_losses(Library& m) {
  m.impl("attack_loss", TORCH_BOX(&attack_loss));
  m.impl("weighted_cross_entropy", TORCH_BOX(&weighted_cross_entropy));
  m.impl("weighted_cross_entropy_backward", TORCH_BOX(&weighted_cross_entropy_backward));
  m.impl("weighted_cross_entropy_and_gradient", TORCH_BOX(&weighted_cross_entropy_and_gradient));
  m.impl("trades_kl", TORCH_BOX(&trades_kl));
  m.impl("trades_kl_backward", TORCH_BOX(&trades_kl_backward));
  m.impl("trades_kl_and_gradient", TORCH_BOX(&trades_kl_and_gradient));
  m.impl("mart_bce", TORCH_BOX(&mart_bce));
  m.impl("mart_bce_backward", TORCH_BOX(&mart_bce_backward));
  m.impl("mart_bce_and_gradient", TORCH_BOX(&mart_bce_and_gradient));
  m.impl("mart_kl", TORCH_BOX(&mart_kl));
  m.impl("mart_kl_backward", TORCH_BOX(&mart_kl_backward));
  m.impl("mart_kl_and_gradient", TORCH_BOX(&mart_kl_and_gradient));
  m.impl("row_square_sum", TORCH_BOX(&row_square_sum));
  m.impl("row_square_sum_backward", TORCH_BOX(&row_square_sum_backward));
  m.impl("softmax_cotangent", TORCH_BOX(&softmax_cotangent));
  m.impl("row_stats", TORCH_BOX(&row_stats));
}

}  // namespace pyadv
