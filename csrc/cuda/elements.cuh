// Runs an element rule (common/rules.h). Each thread computes V elements per turn, with one 16-byte
// access per tensor, or one element (V = 1).
#pragma once

#include "common/rules.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {

constexpr int64_t kShortSpan = 64;  // a shorter span would leave most of a warp idle

// V neighbouring elements of the tensors that a rule reads. The constructor issues all loads before
// any arithmetic.
template <class Rule, class T, int V>
struct Packs {
  Vec<T, V> x_adv, grad, x, x_prev;

  __device__ __forceinline__ Packs(const void* from_x_adv, const void* from_grad,
                                   const void* from_x, const void* from_x_prev, int64_t i) {
    using Pack = Vec<T, V>;
    x_adv = static_cast<const Pack*>(from_x_adv)[i];
    if (Rule::kGrad) grad = static_cast<const Pack*>(from_grad)[i];
    x = static_cast<const Pack*>(from_x)[i];
    if (Rule::kPrev) x_prev = static_cast<const Pack*>(from_x_prev)[i];
  }

  template <class C>
  __device__ __forceinline__ Element<C> element(int k, C lo, C hi) const {
    return {widen(x_adv.v[k]),
            Rule::kGrad ? widen(grad.v[k]) : C(0),
            widen(x.v[k]),
            Rule::kPrev ? widen(x_prev.v[k]) : C(0),
            lo,
            hi};
  }
};

// A span is `length` elements of one row of the mask. With V > 1 every parameter is constant in a
// span. With V = 1 each element looks up its own parameters, so spans are as long as the mask
// allows.
template <class Rule, class T, int V>
__global__ void __launch_bounds__(kThreads) elements_kernel(typename Rule::Args s, int64_t length) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const int64_t spans = s.rows * s.n / length, packs = length / V;
  for (int64_t span = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; span < spans;
       span += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const int64_t first = span * length;
    const bool active = s.active == nullptr || s.active[first / s.n];
    if (!active && s.out == s.x_adv) continue;
    auto values = s.template values_at<C>(first);
    C lo = s.lo.template at<C>(first), hi = s.hi.template at<C>(first);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const int64_t at = span * packs + i;
      Pack result;
      if (active) {
        const Packs<Rule, T, V> pack(s.x_adv, s.grad, s.x, s.x_prev, at);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (V == 1) {
            values = s.template values_at<C>(at);
            lo = s.lo.template at<C>(at);
            hi = s.hi.template at<C>(at);
          }
          result.v[k] = narrow<T>(Rule::apply(pack.template element<C>(k, lo, hi), values));
        }
      } else {
        result = static_cast<const Pack*>(s.x_adv)[at];
      }
      static_cast<Pack*>(s.out)[at] = result;
    }
  }
}

template <class Rule>
int run_elements(const typename Rule::Args& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    const int64_t total = s.rows * s.n, whole = s.active != nullptr ? s.n : total;
    const int64_t span = span_length(s, whole);
    // Absent tensors are null, which counts as aligned.
    const bool vectors = span % V == 0 && (span == whole || span >= kShortSpan) &&
                         aligned16(s.x_adv, s.grad, s.x, s.x_prev, s.out);
    const int64_t length = vectors ? span : whole;
    const RowGrid g(total / length, vectors ? length / V : length);
    if (vectors)
      PYADV_LAUNCH((elements_kernel<Rule, T, V>), g.grid, g.block, 0, stream, s, length);
    else
      PYADV_LAUNCH((elements_kernel<Rule, T, 1>), g.grid, g.block, 0, stream, s, length);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
