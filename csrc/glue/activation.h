// Affine maps with a ReLU: converts the tensors and launches one kernel.
#pragma once

#include <tuple>

#include "common/activation.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr int64_t kActivationGrain = 32768;  // elements worth a thread

// The tensors of one affine map with a ReLU, brought into the layout of its result.
class Activation {
 public:
  Activation(const char* op, const Tensor& first)
      : op_(op),
        first_(first),
        out_(torch::stable::empty_like(first)),
        dtype_(dtype_of(op, first)) {}

  const Tensor& out() const { return out_; }
  DType dtype() const { return dtype_; }

  const void* data(const char* name, const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    check_like(op_, name, *t, first_);
    kept_.push_back(in_layout_of(out_, *t));
    return kept_.back().const_data_ptr();
  }

  // One value per channel (dimension 1), in the type of the arithmetic.
  Param channels(const char* name, const OptionalTensor& t) {
    Param p;
    if (!t.has_value()) return p;
    STD_TORCH_CHECK(out_.dim() >= 2 && t->dim() == 1 && t->numel() == out_.size(1) &&
                        t->scalar_type() == compute_type(dtype_) && t->is_cuda() == out_.is_cuda(),
                    op_, ": ", name, " must have one value per channel");
    kept_.push_back(torch::stable::contiguous(*t));
    p.data = kept_.back().const_data_ptr();
    p.period = t->numel();
    p.inner = p.period > 1 ? out_.stride(1) : std::max<int64_t>(out_.numel(), 1);
    return p;
  }

 private:
  const char* op_;
  Tensor first_, out_;
  DType dtype_;
  std::vector<Tensor> kept_;
};

inline std::tuple<Tensor, Tensor> affine_relu(const Tensor& x, const OptionalTensor& scale,
                                              const OptionalTensor& shift,
                                              const OptionalTensor& added, double slope,
                                              bool keep_sum) {
  Activation call("affine_relu", x);
  const Tensor sum =
      keep_sum ? torch::stable::empty_like(call.out()) : torch::stable::new_empty(x, {0});
  AffineReluArgs args{};
  args.dtype = call.dtype();
  args.x = call.data("x", x);
  args.added = call.data("added", added);
  args.scale = call.channels("scale", scale);
  args.shift = call.channels("shift", shift);
  args.slope = slope;
  args.out = call.out().mutable_data_ptr();
  args.sum = keep_sum ? sum.mutable_data_ptr() : nullptr;
  args.total = x.numel();
  if (args.total > 0)
    backend::Device(x).run(backend::affine_relu, args, args.total, kActivationGrain);
  return {call.out(), sum};
}

inline Tensor affine_relu_backward(const Tensor& y, const Tensor& grad, const OptionalTensor& other,
                                   const OptionalTensor& added, const OptionalTensor& scale,
                                   double slope) {
  Activation call("affine_relu_backward", y);
  AffineReluBackwardArgs args{};
  args.dtype = call.dtype();
  args.y = call.data("y", y);
  args.grad = call.data("grad", grad);
  args.other = call.data("other", other);
  args.added = call.data("added", added);
  args.scale = call.channels("scale", scale);
  args.slope = slope;
  args.out = call.out().mutable_data_ptr();
  args.total = y.numel();
  if (args.total > 0)
    backend::Device(y).run(backend::affine_relu_backward, args, args.total, kActivationGrain);
  return call.out();
}

template <class Library>
void register_activation(Library& m) {
  m.impl("affine_relu", TORCH_BOX(&affine_relu));
  m.impl("affine_relu_backward", TORCH_BOX(&affine_relu_backward));
}

}  // namespace pyadv
