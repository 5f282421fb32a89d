#include "common/geometry.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pyadv {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) track_kernel(TrackArgs args) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < args.rows;
       row += stride)
    args(row);
}

}  // namespace

int track(const TrackArgs& args, void* stream) {
  PYADV_LAUNCH(track_kernel, elementwise_blocks(args.rows), kThreads, 0, stream, args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace pyadv
