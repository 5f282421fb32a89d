#include "common/noise.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// What one Philox block fills: one store, or two for double.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Drawn {
  T v[kBlockWords];
};

// One Philox block per thread and turn. kWhole: rows are whole blocks and the output is aligned.
template <template <class> class Draw, class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) noise_kernel(NoiseArgs args) {
  const int64_t blocks = noise_blocks(args.n);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < args.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const Philox words(args, row);
    T* out = static_cast<T*>(args.out) + row * args.n;
    for (int64_t block = first; block < blocks;
         block += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      Drawn<T> drawn;
      Draw<T>()(words(static_cast<uint32_t>(block)), drawn.v);
      if (kWhole) {
        reinterpret_cast<Drawn<T>*>(out)[block] = drawn;
      } else {
#pragma unroll
        for (int k = 0; k < kBlockWords; ++k)
          if (block * kBlockWords + k < args.n) out[block * kBlockWords + k] = drawn.v[k];
      }
    }
  }
}

template <template <class> class Draw>
int noise(const NoiseArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RowGrid g(args.rows, noise_blocks(args.n));
    if (aligned16(args.out) && args.n % kBlockWords == 0)
      PYADV_LAUNCH((noise_kernel<Draw, T, true>), g.grid, g.block, 0, stream, args);
    else
      PYADV_LAUNCH((noise_kernel<Draw, T, false>), g.grid, g.block, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

// One block per row and turn; the sum of integers is the same in any order.
template <class T>
__global__ void __launch_bounds__(kThreads) row_hash_kernel(HashArgs args) {
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + row * args.n;
    uint64_t sum = 0;
    for (int64_t i = threadIdx.x; i < args.n; i += kThreads)
      sum += hash_term(x[i], static_cast<uint64_t>(i));
    sum = block_reduce(sum, uint64_t{0}, Add());
    if (threadIdx.x == 0) args.out[row] = static_cast<int64_t>(mix(sum));
  }
}

}  // namespace

int keyed_uniform(const NoiseArgs& args, void* stream) { return noise<Uniform>(args, stream); }

int keyed_normal(const NoiseArgs& args, void* stream) { return noise<Normal>(args, stream); }

int row_hash(const HashArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t blocks = args.rows < resident_blocks() ? args.rows : resident_blocks();
    PYADV_LAUNCH((row_hash_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
