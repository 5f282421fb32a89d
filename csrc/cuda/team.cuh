// Teams of threads that work on one row each: a warp on a short row, a block on a long one. Each
// pass over a row reads it again, from the cache after the first time.
#pragma once

#include "common/losses.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {

constexpr int64_t kWarpClasses = 1024;

template <bool kBlock>
struct Team {
  static constexpr int kWidth = kBlock ? kThreads : static_cast<int>(kWarp);
  static constexpr int kTeams = kThreads / kWidth;  // per block

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWidth; }
  __device__ static int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kWidth;
  }
  __device__ static int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kTeams; }

  template <int K, class V, class Op>
  __device__ static __forceinline__ void reduce(V (&v)[K], V identity, Op op) {
    if (kBlock) {
      block_reduce(v, identity, op);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = warp_reduce(v[k], op);
    }
  }
  template <class V, class Op>
  __device__ static __forceinline__ V reduce(V v, V identity, Op op) {
    V values[1] = {v};
    reduce(values, identity, op);
    return values[0];
  }

  // Merges the tops of all threads, whose classes are disjoint.
  template <class C, int K>
  __device__ static __forceinline__ void reduce(Top<C, K>& top) {
    exchange(top);
    if (!kBlock) return;
    constexpr int kWarps = kThreads / static_cast<int>(kWarp);
    __shared__ Top<C, K> partial[kWarps];
    const int warp = static_cast<int>(threadIdx.x / kWarp), in_warp = threadIdx.x % kWarp;
    if (in_warp == 0) partial[warp] = top;
    __syncthreads();
    top.clear();
    if (in_warp < kWarps) top = partial[in_warp];
    exchange(top);
    __syncthreads();  // before the next call writes `partial`
  }

  // Calls body(k, Width<N>) for the classes k .. k + N - 1. N is V if `vectors` holds (all rows
  // begin on a 16-byte boundary) and 1 for the rest.
  template <int V, class Body>
  __device__ static __forceinline__ void each(int64_t n, bool vectors, const Body& body) {
    int64_t first = 0;
    if (vectors) {
      first = n - n % V;
      for (int64_t k = static_cast<int64_t>(lane()) * V; k < first; k += kWidth * V)
        body(k, Width<V>{});
    }
    for (int64_t k = first + lane(); k < n; k += kWidth) body(k, Width<1>{});
  }

  template <int N>
  struct Width {
    static constexpr int value = N;
  };

 private:
  template <class C, int K>
  __device__ static __forceinline__ void exchange(Top<C, K>& top) {
#pragma unroll 1
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      Top<C, K> theirs;
#pragma unroll
      for (int k = 0; k < K; ++k)
        theirs.at[k] = {__shfl_xor_sync(0xffffffffu, top.at[k].value, lanes),
                        __shfl_xor_sync(0xffffffffu, top.at[k].index, lanes)};
#pragma unroll
      for (int k = 0; k < K; ++k) top.insert(theirs.at[k]);
    }
  }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class... P>
__device__ __forceinline__ bool aligned(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Calls body(k, z_k) for the classes of a row.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void read_row(const T* row, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(row), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(row + k);
#pragma unroll
    for (int j = 0; j < N; ++j) body(k + j, widen(v.v[j]));
  });
}

// Writes out_k = body(k, z_k), rounded.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void write_row(const T* row, T* out, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(row, out), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(row + k);
    Vec<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.v[j] = narrow<T>(body(k + j, widen(v.v[j])));
    *reinterpret_cast<Vec<T, N>*>(out + k) = result;
  });
}

template <bool kBlock, class T, class C>
__device__ __forceinline__ void fill_row(T* out, int64_t n, C value) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(out), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    Vec<T, N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v.v[j] = narrow<T>(value);
    *reinterpret_cast<Vec<T, N>*>(out + k) = v;
  });
}

// Calls body(k, u_k, z_k) for the classes of two rows.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void read_rows(const T* u, const T* z, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(u, z), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> a = *reinterpret_cast<const Vec<T, N>*>(u + k);
    const Vec<T, N> b = *reinterpret_cast<const Vec<T, N>*>(z + k);
#pragma unroll
    for (int j = 0; j < N; ++j) body(k + j, widen(a.v[j]), widen(b.v[j]));
  });
}

// Launches kernel<T, kBlock> with one team per row of `width` elements.
#define PYADV_LAUNCH_ROWS(kernel, args, width, stream)                                         \
  dispatch((args).dtype, [&](auto tag) {                                                       \
    using T = typename decltype(tag)::type;                                                    \
    if ((width) <= kWarpClasses)                                                               \
      PYADV_LAUNCH((kernel<T, false>), elementwise_blocks((args).rows * kWarp), kThreads, 0,   \
                   stream, args);                                                              \
    else                                                                                       \
      PYADV_LAUNCH((kernel<T, true>), elementwise_blocks((args).rows * kThreads), kThreads, 0, \
                   stream, args);                                                              \
    return static_cast<int>(cudaGetLastError());                                               \
  })

}  // namespace cuda
}  // namespace pyadv
