#include "common/steps.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// Element i of the step, parameters and mask looked up.
template <class C>
__device__ __forceinline__ LinfStep<C> step_at(const StepArgs& s, int64_t i) {
  return {s.alpha.at<C>(i), s.eps.at<C>(i), s.lo.at<C>(i), s.hi.at<C>(i)};
}

// V elements per thread and turn: one 16-byte access per tensor, or one element (V = 1). kUniform: the
// parameters are the same everywhere, so they are read once.
template <class T, int V, bool kUniform>
__global__ void __launch_bounds__(kThreads) linf_step_kernel(StepArgs s) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const int64_t count = s.rows * s.n / V;
  const Pack* a = static_cast<const Pack*>(s.x_adv);
  const Pack* g = static_cast<const Pack*>(s.grad);
  const Pack* x = static_cast<const Pack*>(s.x);
  Pack* out = static_cast<Pack*>(s.out);
  LinfStep<C> step = step_at<C>(s, 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    Pack va = a[i];
    if (s.active == nullptr || s.active[i * V / s.n]) {
      const Pack vg = g[i], vx = x[i];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (!kUniform) step = step_at<C>(s, i * V + k);
        va.v[k] = narrow<T>(step(widen(va.v[k]), widen(vg.v[k]), widen(vx.v[k])));
      }
    }
    out[i] = va;
  }
}

}  // namespace

int linf_step(const StepArgs& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    const bool uniform = s.alpha.period == 1 && s.eps.period == 1 && s.lo.period == 1 &&
                         s.hi.period == 1;
    const int64_t total = s.rows * s.n;
    // A vector must not straddle two rows of the mask.
    const bool vectors = aligned16(s.x_adv, s.grad, s.x, s.out) && total % V == 0 &&
                         (s.active == nullptr || s.n % V == 0);
    const unsigned blocks = elementwise_blocks(vectors ? total / V : total);
    if (vectors && uniform)
      PYADV_LAUNCH((linf_step_kernel<T, V, true>), blocks, kThreads, 0, stream, s);
    else if (vectors)
      PYADV_LAUNCH((linf_step_kernel<T, V, false>), blocks, kThreads, 0, stream, s);
    else
      PYADV_LAUNCH((linf_step_kernel<T, 1, false>), blocks, kThreads, 0, stream, s);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
