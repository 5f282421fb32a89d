// Thread-block clusters (sm_90) and asynchronous copies to shared memory (sm_80). The tests' shim
// defines the same functions before launch.cuh is read.
#pragma once

#include "cuda/launch.cuh"

#if defined(__CUDACC__)
namespace pyadv {
namespace cuda {

constexpr unsigned kMostClusterBlocks = 8;  // every card with clusters supports this size

// Index of the block in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Waits for all threads of the cluster; their writes to shared memory are visible afterwards.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Reads the variable of block `rank` that corresponds to this block's shared variable `*p`.
__device__ __forceinline__ double cluster_read(const double* p, unsigned rank) {
  double value = 0.0;
#if __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(p));
  asm volatile(
      "{\n\t.reg .u32 remote;\n\tmapa.shared::cluster.u32 remote, %1, %2;\n\t"
      "ld.shared::cluster.f64 %0, [remote];\n\t}"
      : "=d"(value)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return value;
}

// Starts to copy 16 bytes from global to shared memory. The thread that started a copy sees its
// result after copies_wait().
__device__ __forceinline__ void copy_async16(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Whether the current device runs clusters and the kernels were compiled for that. Kernels of one
// type share the answer, since all are compiled with the same flags.
template <class Kernel>
bool runs_clusters(Kernel* kernel) {
  static thread_local int cached_device = -1;
  static thread_local bool yes = false;
  int device = 0;
  cudaGetDevice(&device);
  if (device != cached_device) {
    int clusters = 0;
    cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    cudaFuncAttributes attributes{};
    yes = clusters != 0 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
          attributes.ptxVersion >= 90;
    cached_device = device;
  }
  return yes;
}

// Shared memory that a block can have on the current device.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Rows with more bytes than this per block are split among the blocks of a cluster.
inline int64_t row_bytes_per_block() { return 64 * 1024; }

template <class... Params, class... Args>
void launch_cluster(void (*kernel)(Params...), unsigned cluster, unsigned grid, unsigned block,
                    size_t shared, void* stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, args...);  // an error stays for cudaGetLastError
}

#define PYADV_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared, stream, ...) \
  ::pyadv::cuda::launch_cluster(kernel, cluster, grid, block, shared, stream, __VA_ARGS__)

}  // namespace cuda
}  // namespace pyadv
#endif
