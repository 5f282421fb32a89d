#include "common/weights.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace pyadv {
namespace cuda {
namespace {

// A single block, because the normaliser needs all rows and a batch has few.
__global__ void __launch_bounds__(kThreads) weights_kernel(WeightArgs args) {
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < args.rows; row += kThreads) total += args.weight(row);
  total = block_reduce(total, 0.0, Add());
  const Normaliser normaliser = args.normaliser(total);
  for (int64_t row = threadIdx.x; row < args.rows; row += kThreads) args.write(row, normaliser);
}

}  // namespace

int weights(const WeightArgs& args, void* stream) {
  PYADV_LAUNCH(weights_kernel, 1, kThreads, 0, stream, args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace pyadv
