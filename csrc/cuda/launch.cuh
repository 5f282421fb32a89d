// Launches kernels through a macro, so that the tests can compile them for the CPU. Their shim
// defines PYADV_LAUNCH, PYADV_DYNAMIC_SHARED and multiprocessors() before it includes this header.
#pragma once

#include "common/macros.h"

#ifndef PYADV_LAUNCH
#include <cuda_runtime.h>

#define PYADV_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PYADV_DYNAMIC_SHARED(T, name)                      \
  extern __shared__ __align__(16) unsigned char shared_[]; \
  T* name = reinterpret_cast<T*>(shared_)

namespace pyadv {
namespace cuda {

inline int multiprocessors() {
  static thread_local int cached_device = -1, count = 1;
  int device = 0;
  cudaGetDevice(&device);
  if (device != cached_device) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    cached_device = device;
  }
  return count;
}

}  // namespace cuda
}  // namespace pyadv
#endif

namespace pyadv {
namespace cuda {

constexpr int kThreads = 256;

// Blocks of kThreads that the card runs at once. Kernels loop over the rest of the work.
inline int64_t resident_blocks() { return static_cast<int64_t>(multiprocessors()) * 8; }

inline unsigned elementwise_blocks(int64_t work) {
  const int64_t needed = (work + kThreads - 1) / kThreads;
  return static_cast<unsigned>(needed < resident_blocks() ? needed : resident_blocks());
}

// Grid of a kernel on rows: x runs over the `work` items of a row and y over the rows, so that no
// thread divides. Short rows share a block. Kernels loop over both.
struct RowGrid {
  dim3 grid, block;

  RowGrid(int64_t rows, int64_t work) {
    block.x = 32;
    while (block.x < kThreads && block.x < work) block.x *= 2;
    block.y = kThreads / block.x;
    const int64_t across = (work + block.x - 1) / block.x, down = (rows + block.y - 1) / block.y;
    const int64_t most = 4 * resident_blocks();  // several waves of blocks even out the end
    grid.x = static_cast<unsigned>(across < most ? across : most);
    const int64_t left = most / grid.x < 65535 ? most / grid.x : 65535;
    grid.y = static_cast<unsigned>(down < left ? down : left);
  }
};

}  // namespace cuda
}  // namespace pyadv
