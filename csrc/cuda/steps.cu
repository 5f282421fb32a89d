#include "common/steps.h"

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace pyadv {
namespace cuda {
namespace {

// One block per row and pair of tensors; units of U, 16 bytes or 1.
template <class U>
__global__ void __launch_bounds__(kThreads) keep_rows_kernel(KeepRowsArgs k) {
  const int64_t row = blockIdx.x, units = k.row_bytes / static_cast<int64_t>(sizeof(U));
  if (!k.mask[row]) return;
  const U* from = static_cast<const U*>(k.from[blockIdx.y]) + row * units;
  U* to = static_cast<U*>(k.to[blockIdx.y]) + row * units;
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
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
  const dim3 blocks(static_cast<unsigned>(k.rows), 2);
  if (aligned16(k.from[0], k.from[1], k.to[0], k.to[1]) && k.row_bytes % 16 == 0)
    PYADV_LAUNCH((keep_rows_kernel<Wide>), blocks, kThreads, 0, stream, k);
  else
    PYADV_LAUNCH((keep_rows_kernel<unsigned char>), blocks, kThreads, 0, stream, k);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace cuda
}  // namespace pyadv
