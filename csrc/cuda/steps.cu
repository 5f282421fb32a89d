#include "common/steps.h"

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace pyadv {
namespace cuda {
namespace {

// z: the pair of tensors; units of U, 16 bytes or 1.
template <class U>
__global__ void __launch_bounds__(kThreads) keep_rows_kernel(KeepRowsArgs k) {
  const int64_t units = k.row_bytes / static_cast<int64_t>(sizeof(U));
  const U* from = static_cast<const U*>(blockIdx.z == 0 ? k.from[0] : k.from[1]);
  U* to = static_cast<U*>(blockIdx.z == 0 ? k.to[0] : k.to[1]);
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < k.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    if (!k.mask[row]) continue;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < units;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x)
      to[row * units + i] = from[row * units + i];
  }
}

}  // namespace

int linf_step(const StepArgs& s, void* stream) { return run_elements<LinfStep>(s, stream); }

int linf_momentum_step(const StepArgs& s, void* stream) {
  return run_elements<LinfMomentumStep>(s, stream);
}

int l2_step(const StepArgs& s, void* stream) { return run_rows<L2Step>(s, stream); }

int l2_momentum_step(const StepArgs& s, void* stream) {
  return run_rows<L2MomentumStep>(s, stream);
}

int l1_step(const StepArgs& s, void* stream) { return run_rows<L1Step>(s, stream); }

int keep_rows(const KeepRowsArgs& k, void* stream) {
  using Wide = Vec<unsigned char, 16>;
  const bool wide = aligned16(k.from[0], k.from[1], k.to[0], k.to[1]) && k.row_bytes % 16 == 0;
  RowGrid g(k.rows, wide ? k.row_bytes / 16 : k.row_bytes);
  g.grid.z = 2;
  if (wide)
    PYADV_LAUNCH((keep_rows_kernel<Wide>), g.grid, g.block, 0, stream, k);
  else
    PYADV_LAUNCH((keep_rows_kernel<unsigned char>), g.grid, g.block, 0, stream, k);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace pyadv
