#include "common/weights.h"

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/reduce.h"

namespace pyadv {
namespace cpu {
namespace {

// Both loops vectorise because the kind and the type are constants.
template <WeightKind Kind, DType Type>
struct WeightsLoop {
  static PYADV_HD void run(const WeightArgs* given) {
    WeightArgs args = *given;
    args.kind = Kind;
    args.dtype = Type;
    args.slope = {nullptr, given->slope.at<double>(0)};
    args.centre = {nullptr, given->centre.at<double>(0)};
    const double total =
        sum<double>(args.rows, [&](int64_t row) PYADV_INLINE_LAMBDA { return args.weight(row); });
    const Normaliser normaliser = args.normaliser(total);
    PYADV_INDEPENDENT
    for (int64_t row = 0; row < args.rows; ++row) args.write(row, normaliser);
  }
};

}  // namespace

void weights(const WeightArgs& args, int64_t, int64_t) {
  if (args.kind == WeightKind::Tanh)
    run_wide<WeightsLoop<WeightKind::Tanh, DType::Float>>(&args);
  else if (args.kind == WeightKind::Sigmoid)
    run_wide<WeightsLoop<WeightKind::Sigmoid, DType::Float>>(&args);
  else if (args.kind == WeightKind::Discrete)
    run_wide<WeightsLoop<WeightKind::Discrete, DType::Float>>(&args);
  else if (args.dtype == DType::Float)
    run_wide<WeightsLoop<WeightKind::Mail, DType::Float>>(&args);
  else
    run_wide<WeightsLoop<WeightKind::Mail, DType::Double>>(&args);
}

}  // namespace cpu
}  // namespace pyadv
