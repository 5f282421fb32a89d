#include "common/noise.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

constexpr int kHashThreads = 1024;
constexpr int kGroups = 4;  // groups per thread and turn; they share the row's keys and the indices

// Numbers that a thread draws at a time. A Philox block gives four: one store of float, two of
// double; 16-bit floats take two blocks for a store of 16 bytes.
template <class T>
struct alignas(16) Group {
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;
  T v[kBlocks * kBlockWords];
};

// Draws kGroups groups per thread and turn. kWhole: rows are whole groups, and the output is
// aligned.
template <template <class> class Draw, class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) noise_kernel(NoiseArgs args) {
  constexpr int kBlocks = Group<T>::kBlocks, kNumbers = kBlocks * kBlockWords;
  const int64_t groups = (args.n + kNumbers - 1) / kNumbers;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroups;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < args.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const Philox words(args, row);
    T* out = static_cast<T*>(args.out) + row * args.n;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * kGroups + threadIdx.x;
         first < groups; first += stride) {
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        const int64_t group = first + u * static_cast<int64_t>(blockDim.x);
        if (group >= groups) break;
        Group<T> drawn;
#pragma unroll
        for (int k = 0; k < kBlocks; ++k)
          Draw<T>()(words(static_cast<uint32_t>(group * kBlocks + k)), drawn.v + k * kBlockWords);
        if (kWhole) {
          reinterpret_cast<Group<T>*>(out)[group] = drawn;
        } else {
#pragma unroll
          for (int k = 0; k < kNumbers; ++k)
            if (group * kNumbers + k < args.n) out[group * kNumbers + k] = drawn.v[k];
        }
      }
    }
  }
}

template <template <class> class Draw>
int noise(const NoiseArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kNumbers = Group<T>::kBlocks * kBlockWords;
    const int64_t groups = (args.n + kNumbers - 1) / kNumbers;
    const RowGrid g(args.rows, (groups + kGroups - 1) / kGroups);
    if (aligned16(args.out) && args.n % kNumbers == 0)
      PYADV_LAUNCH((noise_kernel<Draw, T, true>), g.grid, g.block, 0, stream, args);
    else
      PYADV_LAUNCH((noise_kernel<Draw, T, false>), g.grid, g.block, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

// One block per row and turn. A sum of integers is the same in any order.
template <class T, int V>
__global__ void __launch_bounds__(kHashThreads) row_hash_kernel(HashArgs args) {
  using Pack = Vec<T, V>;
  const int64_t packs = args.n / V;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const Pack* x = static_cast<const Pack*>(args.x) + row * packs;
    uint64_t sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const Pack pack = x[i];
      uint64_t offset = hash_offset(static_cast<uint64_t>(i) * V);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        sum += hash_term(pack.v[k], offset);
        offset += hash_offset(1) - hash_offset(0);
      }
    }
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
    constexpr int V = 16 / sizeof(T);
    const bool vectors = aligned16(args.x) && args.n % V == 0;
    const int64_t work = vectors ? args.n / V : args.n;
    int64_t threads = kWarp;
    while (threads < kHashThreads && 2 * threads < work) threads *= 2;  // two turns or more
    const int64_t most = resident_blocks() * kThreads / threads;
    const unsigned blocks = static_cast<unsigned>(args.rows < most ? args.rows : most);
    const unsigned block = static_cast<unsigned>(threads);
    if (vectors)
      PYADV_LAUNCH((row_hash_kernel<T, V>), blocks, block, 0, stream, args);
    else
      PYADV_LAUNCH((row_hash_kernel<T, 1>), blocks, block, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv
