// Compiles CUDA C++ as plain C++ for tests. Force-included (g++ -include) before a .cu file, it
// replaces the compiler's built-ins and cuda_runtime.h, and runs every launch on the CPU at once.
//
// Each CUDA thread is a fiber. Blocks run one after another, those of a cluster in turns. A thread
// runs until it waits at a barrier or a warp collective; a seeded generator then draws the next
// thread, so that code which forgets to wait computes wrong values. A launch throws where hardware
// would hang or be undefined: barriers that not all threads reach, collectives whose mask names a
// lane that does not exist, has returned or waits elsewhere, shuffles from lanes outside the mask.
// A launch that the driver would refuse sets cudaGetLastError(). Shared memory holds NaN bytes when
// a block starts.
//
// It cannot show data races that do not depend on the order of whole stretches between barriers,
// memory ordering, registers, occupancy or speed.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so shared variables are statics. shared_memory.ld gathers them so that
// the simulator can fill them before each block, and exchange them between the blocks of a cluster.
#define __shared__ static

#define PYADV_LAUNCH(kernel, grid, block, shared, stream, ...)                              \
  (static_cast<void>(stream),                                                               \
   ::cuda_on_cpu::launch({#kernel, reinterpret_cast<const void*>(kernel)}, (grid), (block), \
                         (shared), [&] { (kernel)(__VA_ARGS__); }))
#define PYADV_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared, stream, ...)             \
  (static_cast<void>(stream), ::cuda_on_cpu::launch(                                        \
                                  {#kernel, reinterpret_cast<const void*>(kernel)}, (grid), \
                                  (block), (shared), [&] { (kernel)(__VA_ARGS__); }, (cluster)))
#define PYADV_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::cuda_on_cpu::dynamic_shared())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

// Indices of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

struct Kernel {
  const char* name;
  const void* address;
};

void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared,
            const std::function<void()>& thread, unsigned cluster = 1);
void* dynamic_shared();
void random_order(unsigned seed);

// The place in the source where a thread waits.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

unsigned lane();
void block_barrier(Site site);
// Waits for the lanes of `mask` and returns the `bits` of lane `source`.
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source, Site site);
unsigned ballot(unsigned mask, bool vote, Site site);
int block_count(bool vote, Site site);
unsigned cluster_rank();
void cluster_barrier(Site site);
// The address, in block `rank` of the cluster, of this block's shared variable `p`.
const void* cluster_address(const void* p, unsigned rank, Site site);
// A copy of 16 bytes that arrives when the thread calls finish_copies().
void start_copy(void* to, const void* bytes);
void finish_copies();

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic<T>::value, "shuffles take arithmetic types");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

// Barriers and warp collectives.

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::block_barrier(site);
}
inline int __syncthreads_count(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_count(p != 0, site);
}
inline int __syncthreads_or(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_count(p != 0, site) != 0;
}
inline int __syncthreads_and(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::block_count(p == 0, site) == 0;
}
inline unsigned __ballot_sync(unsigned mask, int p,
                              cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot(mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot(mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::ballot(mask, p != 0, site) == mask;
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::ballot(mask, false, site);
}

// A source outside the segment of `width` lanes gives the lane's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const unsigned first = cuda_on_cpu::lane() & -width;
  return cuda_on_cpu::shuffle(mask, value, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const unsigned lane = cuda_on_cpu::lane();
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return cuda_on_cpu::shuffle(mask, value, inside ? lane + delta : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const unsigned lane = cuda_on_cpu::lane();
  const bool inside = (lane & (width - 1)) >= delta;
  return cuda_on_cpu::shuffle(mask, value, inside ? lane - delta : lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned end = (lane & -width) + width;
  return cuda_on_cpu::shuffle(mask, value, (lane ^ flip) < end ? lane ^ flip : lane, site);
}

// Memory and arithmetic.

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Integers only. The order of float atomics differs from run to run, which the library does not
// allow.
template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral<T>::value, "float atomics are not deterministic");
  const T old = *p;
  *p = old + value;
  return old;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(v); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// The runtime.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

cudaError_t cudaGetLastError();
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

namespace pyadv {
namespace cuda {

// Clusters and asynchronous copies, in place of cuda/cluster.cuh.
constexpr unsigned kMostClusterBlocks = 8;
inline unsigned cluster_rank() { return cuda_on_cpu::cluster_rank(); }
inline void cluster_barrier(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::cluster_barrier(site);
}
inline double cluster_read(const double* p, unsigned rank,
                           cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return *static_cast<const double*>(cuda_on_cpu::cluster_address(p, rank, site));
}
inline void copy_async16(void* to, const void* from) {
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  const Sixteen bytes = *static_cast<const Sixteen*>(from);  // the sanitizers check both addresses
  Sixteen nothing;
  memset(&nothing, 0xFF, sizeof(nothing));
  *static_cast<Sixteen*>(to) = nothing;
  cuda_on_cpu::start_copy(to, &bytes);
}
inline void copies_wait() { cuda_on_cpu::finish_copies(); }

// CUDA_ON_CPU_CLUSTERS=0 stands for a card without clusters.
template <class Kernel>
bool runs_clusters(Kernel*) {
  const char* clusters = getenv("CUDA_ON_CPU_CLUSTERS");
  return clusters == nullptr || clusters[0] != '0';
}

// Small numbers, so that small rows are split among blocks, and staged whole, in part and not at
// all.
inline int64_t most_shared_bytes() { return 6 * 1024; }
inline int64_t row_bytes_per_block() { return 512; }

// A small number, so that small tensors already need several turns of a grid-stride loop.
inline int multiprocessors() { return 2; }
}  // namespace cuda
}  // namespace pyadv
