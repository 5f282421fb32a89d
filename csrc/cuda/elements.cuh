// Runs an elementwise rule (LinfStep and the like): V elements per thread and turn, one 16-byte access
// per tensor, or one element (V = 1).
#pragma once

#include "common/projections.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {

// V neighbouring elements of the tensors a rule reads, with all loads issued before the arithmetic.
template <class Rule, class T, int V>
struct Packs {
  Vec<T, V> a, g, x, prev;

  __device__ __forceinline__ Packs(const void* from_a, const void* from_g, const void* from_x,
                                   const void* from_prev, int64_t i) {
    using Pack = Vec<T, V>;
    a = static_cast<const Pack*>(from_a)[i];
    if (Rule::kGrad) g = static_cast<const Pack*>(from_g)[i];
    x = static_cast<const Pack*>(from_x)[i];
    if (Rule::kPrev) prev = static_cast<const Pack*>(from_prev)[i];
  }

  template <class C>
  __device__ __forceinline__ Element<C> element(int k, C lo, C hi) const {
    return {widen(a.v[k]), Rule::kGrad ? widen(g.v[k]) : C(0), widen(x.v[k]),
            Rule::kPrev ? widen(prev.v[k]) : C(0), lo, hi};
  }
};

// kUniform: the parameters are the same everywhere, so they are read once.
template <class Rule, class T, int V, bool kUniform>
__global__ void __launch_bounds__(kThreads) elements_kernel(StepArgs s) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const int64_t count = s.rows * s.n / V;
  Sizes<C> sizes = sizes_at<C>(s, 0);
  C lo = s.lo.at<C>(0), hi = s.hi.at<C>(0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    Pack result;
    if (s.active == nullptr || s.active[i * V / s.n]) {
      const Packs<Rule, T, V> packs(s.x_adv, s.grad, s.x, s.x_prev, i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (!kUniform) {
          sizes = sizes_at<C>(s, i * V + k);
          lo = s.lo.at<C>(i * V + k);
          hi = s.hi.at<C>(i * V + k);
        }
        result.v[k] = narrow<T>(Rule::apply(packs.template element<C>(k, lo, hi), sizes));
      }
    } else {
      result = static_cast<const Pack*>(s.x_adv)[i];
    }
    static_cast<Pack*>(s.out)[i] = result;
  }
}

template <class Rule>
int run_elements(const StepArgs& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    const bool uniform = s.alpha.period == 1 && s.eps.period == 1 && s.momentum.period == 1 &&
                         s.lo.period == 1 && s.hi.period == 1;
    const int64_t total = s.rows * s.n;
    // A vector must not straddle two rows of the mask. Absent tensors are null, and so aligned.
    const bool vectors = aligned16(s.x_adv, s.grad, s.x, s.x_prev, s.out) && total % V == 0 &&
                         (s.active == nullptr || s.n % V == 0);
    const unsigned blocks = elementwise_blocks(vectors ? total / V : total);
    if (vectors && uniform)
      PYADV_LAUNCH((elements_kernel<Rule, T, V, true>), blocks, kThreads, 0, stream, s);
    else if (vectors)
      PYADV_LAUNCH((elements_kernel<Rule, T, V, false>), blocks, kThreads, 0, stream, s);
    else
      PYADV_LAUNCH((elements_kernel<Rule, T, 1, false>), blocks, kThreads, 0, stream, s);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
