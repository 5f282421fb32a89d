// Launching: one macro, so that the kernels also compile for the CPU in the tests' CUDA shim, which
// defines PYADV_LAUNCH, PYADV_DYNAMIC_SHARED and multiprocessors() before this header is read.
#pragma once

#include "common/macros.h"

#ifndef PYADV_LAUNCH
#include <cuda_runtime.h>

#define PYADV_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PYADV_DYNAMIC_SHARED(T, name)                    \
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

// Enough blocks to fill the card a few times over; kernels stride over the rest.
inline unsigned elementwise_blocks(int64_t work) {
  const int64_t needed = (work + kThreads - 1) / kThreads;
  const int64_t most = static_cast<int64_t>(multiprocessors()) * 8;
  return static_cast<unsigned>(needed < most ? needed : most);
}

}  // namespace cuda
}  // namespace pyadv
