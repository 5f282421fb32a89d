#include "common/norms.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// Calls f(Tag<Vec>, i) for the elements of a piece that belong to this thread: 16 bytes at a time
// if the pointers are aligned, the rest one by one.
template <class T, class F>
__device__ __forceinline__ void for_piece(const NormArgs::Piece& p, bool aligned, F&& f) {
  constexpr int V = 16 / sizeof(T);
  const int64_t whole = aligned ? p.begin + (p.end - p.begin) / V * V : p.begin;
  for (int64_t i = p.begin + threadIdx.x * V; i < whole; i += kThreads * V) f(Tag<Vec<T, V>>(), i);
  for (int64_t i = whole + threadIdx.x; i < p.end; i += kThreads) f(Tag<Vec<T, 1>>(), i);
}

template <class P>
__device__ __forceinline__ bool starts_aligned(const P* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// One block per piece.
template <class T>
__global__ void __launch_bounds__(kThreads) norm_pieces_kernel(NormArgs args) {
  using C = compute_t<T>;
  const NormArgs::Piece p = args.piece(blockIdx.x);
  const T* w = static_cast<const T*>(args.data[p.tensor]);
  C sum = C(0);
  for_piece<T>(p, starts_aligned(w), [&](auto tag, int64_t i) {
    using Pack = typename decltype(tag)::type;
    const Pack pack = *reinterpret_cast<const Pack*>(w + i);
#pragma unroll
    for (const T& element : pack.v) {
      const C v = widen(element);
      sum += v * v;
    }
  });
  sum = block_reduce(sum, C(0), Add());
  if (threadIdx.x == 0) args.partial[blockIdx.x] = static_cast<double>(sum);
}

// One thread per tensor; a tensor has few pieces.
template <class C>
__global__ void __launch_bounds__(kNormTensors) norm_roots_kernel(NormArgs args) {
  const int64_t t = threadIdx.x;
  if (t < args.tensors) static_cast<C*>(args.norms)[t] = static_cast<C>(sqrt(args.sum_of(t)));
}

template <class T>
__global__ void __launch_bounds__(kThreads) norms_backward_kernel(NormArgs args) {
  using C = compute_t<T>;
  const NormArgs::Piece p = args.piece(blockIdx.x);
  const T* w = static_cast<const T*>(args.data[p.tensor]);
  T* out = static_cast<T*>(args.grad[p.tensor]);
  const C scale = args.scale<C>(p.tensor);
  for_piece<T>(p, starts_aligned(w) && starts_aligned(out), [&](auto tag, int64_t i) {
    using Pack = typename decltype(tag)::type;
    Pack pack = *reinterpret_cast<const Pack*>(w + i);
#pragma unroll
    for (T& element : pack.v) element = narrow<T>(widen(element) * scale);
    *reinterpret_cast<Pack*>(out + i) = pack;
  });
}

unsigned pieces(const NormArgs& args) { return static_cast<unsigned>(args.first[args.tensors]); }

}  // namespace

int norm_pieces(const NormArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PYADV_LAUNCH((norm_pieces_kernel<T>), pieces(args), kThreads, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

int norm_roots(const NormArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using C = compute_t<typename decltype(tag)::type>;
    PYADV_LAUNCH((norm_roots_kernel<C>), 1, kNormTensors, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

int norms_backward(const NormArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PYADV_LAUNCH((norms_backward_kernel<T>), pieces(args), kThreads, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
