// Reductions over a warp and over a block, in a fixed order. Every thread gets the result. All
// threads of the block must call them, and blockDim.x must be a multiple of 32.
#pragma once

#include "common/math.h"

namespace pyadv {
namespace cuda {

constexpr unsigned kWarp = 32;

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

// The result is NaN if either value is.
struct Max {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return nan_max(a, b);
  }
};

template <class V, class Op>
__device__ __forceinline__ V warp_reduce(V v, Op op) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    v = op(v, __shfl_xor_sync(0xffffffffu, v, lanes));
  return v;
}

// Reduces K values with one pair of barriers.
template <int K, class V, class Op>
__device__ __forceinline__ void block_reduce(V (&v)[K], V identity, Op op) {
  __shared__ V partial[K][kWarp];
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = warp_reduce(v[k], op);
  if (warps == 1) return;
  if (lane == 0)
#pragma unroll
    for (int k = 0; k < K; ++k) partial[k][threadIdx.x / kWarp] = v[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = warp_reduce(lane < warps ? partial[k][lane] : identity, op);
  __syncthreads();  // before the next call overwrites `partial`
}

template <class V, class Op>
__device__ __forceinline__ V block_reduce(V v, V identity, Op op) {
  V values[1] = {v};
  block_reduce(values, identity, op);
  return values[0];
}

}  // namespace cuda
}  // namespace pyadv
