// Runs the kernel of a step or a projection: brings the tensors into one layout, converts the
// parameters, launches.
#pragma once

#include "common/rules.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kElementGrain = 32768;  // elements worth a thread

// The tensors of a step or a projection, as the op receives them.
struct RuleInputs {
  const char* op;
  Tensor& out;
  const Tensor& x_adv;
  const Tensor& x;
  const OptionalTensor& lo;
  const OptionalTensor& hi;
  OptionalTensor active = std::nullopt, grad = std::nullopt, x_prev = std::nullopt;
};

inline void check_inputs(const RuleInputs& in) {
  check_like(in.op, "x", in.x, in.x_adv);
  check_like(in.op, "out", in.out, in.x_adv);
  if (in.grad.has_value()) check_like(in.op, "grad", *in.grad, in.x_adv);
  if (in.x_prev.has_value()) check_like(in.op, "x_prev", *in.x_prev, in.x_adv);
}

// One launch: fills the arguments and keeps the tensors alive that they point to.
class RuleCall {
 public:
  enum class Kind { Element, Row };

  explicit RuleCall(const RuleInputs& in)
      : in_(in),
        device_(in.out),
        mask_(in.op, in.active, in.x_adv),
        output_(in.out),
        parameters_(in.op, output_.block(), dtype_of(in.op, in.x_adv)) {}

  const Tensor& block() const { return output_.block(); }

  // Address of the data in the layout of the output.
  const void* data(const OptionalTensor& t) {
    if (!t.has_value()) return nullptr;
    kept_.push_back(in_layout_of(block(), *t));
    return kept_.back().const_data_ptr();
  }

  template <template <class> class Params>
  void fill(RuleArgs<Params>& args, const Params<Tensor>& given, Kind kind) {
    args.dtype = dtype_of(in_.op, in_.x_adv);
    args.rows = rows_of(in_.x_adv);
    args.n = row_size(in_.x_adv);
    args.active = mask_.data();
    args.x_adv = data(in_.x_adv);
    args.grad = data(in_.grad);
    args.x = data(in_.x);
    args.x_prev = data(in_.x_prev);
    args.out = output_.data();
    args.params = given.template map<Param>([this](const Tensor& t) { return parameters_.add(t); });
    args.lo = parameters_.add(in_.lo, -kInfinity);
    args.hi = parameters_.add(in_.hi, kInfinity);
    bool by_row =
        parameters_.differs_between_rows(in_.lo) || parameters_.differs_between_rows(in_.hi);
    if (kind == Kind::Row) {
      args.params.template map<int>([this](const Param& p) {
        STD_TORCH_CHECK(parameters_.constant_in_rows(p), in_.op,
                        ": a parameter must be one number or hold one per sample");
        return 0;
      });
      args.per_element =
          !parameters_.constant_in_rows(args.lo) || !parameters_.constant_in_rows(args.hi);
    } else {
      args.per_element = parameters_.differ_within_rows();
      given.template map<int>([&](const Tensor& t) {
        by_row = by_row || parameters_.differs_between_rows(t);
        return 0;
      });
    }
    if (!args.per_element) return;
    Tensor like = block();
    if (!by_row) like = torch::stable::narrow(like, 0, 0, 1);
    if (kind == Kind::Element)
      args.params = given.template map<Param>(
          [&](const Tensor& t) { return parameters_.per_element(t, like); });
    args.lo = parameters_.per_element(in_.lo, like, -kInfinity);
    args.hi = parameters_.per_element(in_.hi, like, kInfinity);
  }

  template <class Kernel, class Args>
  void run_elements(Kernel kernel, const Args& args) {
    device_.run(kernel, args, args.rows * args.n, kElementGrain);
    output_.finish();
  }

  template <class Kernel, class Args>
  void run_rows(Kernel kernel, const Args& args) {
    device_.run(kernel, args, args.rows, std::max<int64_t>(1, kElementGrain / args.n));
    output_.finish();
  }

 private:
  const RuleInputs& in_;
  backend::Device device_;
  Mask mask_;
  Output output_;
  Parameters parameters_;
  std::vector<Tensor> kept_;
};

template <template <class> class Params, class Kernel>
void run_element_rule(Kernel kernel, const RuleInputs& in, const Params<Tensor>& given) {
  check_inputs(in);
  if (in.out.numel() == 0) return;
  RuleArgs<Params> args{};
  RuleCall call(in);
  call.fill(args, given, RuleCall::Kind::Element);
  call.run_elements(kernel, args);
}

template <template <class> class Params, class Kernel>
void run_row_rule(Kernel kernel, const RuleInputs& in, const Params<Tensor>& given) {
  check_inputs(in);
  if (in.out.numel() == 0) return;
  RuleArgs<Params> args{};
  RuleCall call(in);
  call.fill(args, given, RuleCall::Kind::Row);
  call.run_rows(kernel, args);
}

}  // namespace pyadv
