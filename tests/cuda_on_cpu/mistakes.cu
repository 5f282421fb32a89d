// Kernels with one known mistake each, which the simulator must catch, and correct kernels, which
// it must let pass. `run(name)` runs one and prints "right", "wrong values" or the error; a
// sanitizer ends the program itself. tests/test_cuda_on_cpu.py holds the expected output.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

constexpr int kBlock = 128;
constexpr unsigned kAll = 0xFFFFFFFFu;
using Four = Vec<float, 4>;

// Reverses the block twice through shared memory, so that out = in. kAfterWrite and kAfterRead are
// the barriers that it needs.
template <bool kAfterWrite, bool kAfterRead>
__global__ void reverse_twice(const float* in, float* out) {
  __shared__ float row[kBlock];
  const int t = threadIdx.x;
  float v = in[t];
  for (int turn = 0; turn < 2; ++turn) {
    row[t] = v;
    if (kAfterWrite) __syncthreads();
    v = row[kBlock - 1 - t];
    if (kAfterRead) __syncthreads();
  }
  out[t] = v;
}

// Counts the threads of a block with two shared arrays of one template.
template <class T, bool kInitialise>
__global__ void count_threads(T* out) {
  __shared__ int count[1];
  __shared__ T result[1];
  if (kInitialise && threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(&count[0], 1);
  __syncthreads();
  if (threadIdx.x == 0) result[0] = static_cast<T>(count[0]);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = result[0];
}

template <bool kInitialise>
__global__ void dynamic_sum(const float* in, float* out) {
  PYADV_DYNAMIC_SHARED(float, sum);
  if (kInitialise && threadIdx.x == 0) sum[0] = 0.0f;
  __syncthreads();
  for (unsigned k = 0; k < blockDim.x; ++k) {
    if (threadIdx.x == k) sum[0] += in[k];
    __syncthreads();
  }
  out[threadIdx.x] = sum[0];
}

__global__ void dynamic_overflow() {
  PYADV_DYNAMIC_SHARED(float, row);
  row[threadIdx.x + 1] = 1.0f;
}

__global__ void shared_overflow(float* out, int extra) {
  __shared__ float row[kBlock];
  float* end = row + extra;
  end[threadIdx.x] = 1.0f;
  __syncthreads();
  *out = row[0];
}

__global__ void copy_fours(const float* in, float* out, int count) {
  const int i = threadIdx.x;
  if (i * 4 < count) reinterpret_cast<Four*>(out)[i] = reinterpret_cast<const Four*>(in)[i];
}

__global__ void index_overflow(int* out, int big) { out[threadIdx.x] = (big * 4096) % 7; }

__global__ void return_before_shuffle(float* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void caller_not_in_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, 1.0f, 1);
}

__global__ void source_not_in_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1.0f, 20);
}

__global__ void collectives_do_not_match(int* out) {
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  else
    out[threadIdx.x] = __any_sync(kAll, 1);
}

__global__ void masks_do_not_match(int* out) {
  out[threadIdx.x] = __any_sync(threadIdx.x % 32 < 16 ? kAll : 0xFFFF0000u, 1);
}

__global__ void different_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void return_before_barrier() {
  if (threadIdx.x == 70) return;
  __syncthreads();
}

__global__ void count_on_earlier_block(float* sums) {
  if (threadIdx.x == 0) sums[blockIdx.x + 1] = sums[blockIdx.x] + 1.0f;
}

// Compares every collective with its expected result.
__global__ void collectives(int* wrong) {
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z, lane = t % 32, base = lane & ~7;
  const auto check = [&](bool ok) { *wrong += !ok; };
  check(__shfl_sync(kAll, lane * 1.5, 7) == 7 * 1.5);
  check(__shfl_sync(kAll, lane, 9, 8) == base + 1);
  check(__shfl_xor_sync(kAll, lane, 16) == (lane ^ 16));
  check(__shfl_xor_sync(kAll, lane, 3, 8) == (lane ^ 3));
  check(__shfl_down_sync(kAll, lane, 4) == (lane < 28 ? lane + 4 : lane));
  check(__shfl_up_sync(kAll, lane, 2, 8) == (lane - base >= 2 ? lane - 2 : lane));
  check(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
  check(__any_sync(kAll, lane == 31) && !__any_sync(kAll, 0));
  check(__all_sync(kAll, lane < 32) && !__all_sync(kAll, lane != 4));
  if (lane < 16) check(__shfl_xor_sync(0x0000FFFFu, lane, 8) == (lane ^ 8));
  __syncwarp();
  check(__syncthreads_count(lane < 10) == 10 * threads / 32);
  check(__syncthreads_count(1) == threads);
  check(__syncthreads_or(t == 1) && !__syncthreads_or(0));
  check(__syncthreads_and(1) && !__syncthreads_and(t != 1));
}

// Every thread of a cluster adds the ranks of its blocks, which the blocks publish. kBefore and
// kAfter: the barriers that it needs.
template <bool kBefore, bool kAfter>
__global__ void sum_ranks(float* out, unsigned blocks) {
  __shared__ double rank[1];
  if (threadIdx.x == 0) rank[0] = cluster_rank();
  if (kBefore) cluster_barrier();
  double sum = 0.0;
  for (unsigned k = 0; k < blocks; ++k) sum += cluster_read(rank, k);
  if (kAfter) cluster_barrier();
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(sum);
}

__global__ void one_block_skips_the_barrier() {
  if (blockIdx.x != 1) cluster_barrier();
}

__global__ void no_such_block(float* out) {
  __shared__ double value[1];
  value[0] = 1.0;
  cluster_barrier();
  *out = static_cast<float>(cluster_read(value, 3));
}

template <bool kWait>
__global__ void copy_through_shared(const float* in, float* out) {
  PYADV_DYNAMIC_SHARED(Four, shared);
  copy_async16(shared + threadIdx.x, in + 4 * threadIdx.x);
  if (kWait) copies_wait();
  reinterpret_cast<Four*>(out)[threadIdx.x] = shared[threadIdx.x];
}

template <bool kBefore, bool kAfter>
bool sums_ranks() {
  std::vector<float> out(3 * 4 * 64);
  PYADV_LAUNCH_CLUSTER((sum_ranks<kBefore, kAfter>), 4, 12, 64, 0, nullptr, out.data(), 4u);
  for (const float v : out)
    if (v != 6.0f) return false;
  return true;
}

__global__ void nothing() {}

std::vector<float> numbers(int n) {
  std::vector<float> v(n);
  std::iota(v.begin(), v.end(), 1.0f);
  return v;
}

template <class T>
bool all_equal(const std::vector<T>& v, T value) {
  for (const T& x : v)
    if (!(x == value)) return false;
  return true;
}

template <class Kernel>
bool keeps(Kernel launch) {
  for (unsigned seed = 0; seed < 8; ++seed) {
    cuda_on_cpu::random_order(seed);
    const std::vector<float> in = numbers(kBlock);
    std::vector<float> out(kBlock);
    launch(in.data(), out.data());
    if (in != out) return false;
  }
  return true;
}

const std::map<std::string, std::function<bool()>> kCases = {
    {"right_barriers",
     [] {
       return keeps([](auto in, auto out) {
         PYADV_LAUNCH((reverse_twice<true, true>), 1, kBlock, 0, nullptr, in, out);
       });
     }},
    {"no_barrier_after_write",
     [] {
       return keeps([](auto in, auto out) {
         PYADV_LAUNCH((reverse_twice<false, true>), 1, kBlock, 0, nullptr, in, out);
       });
     }},
    {"no_barrier_after_read",
     [] {
       return keeps([](auto in, auto out) {
         PYADV_LAUNCH((reverse_twice<true, false>), 1, kBlock, 0, nullptr, in, out);
       });
     }},
    {"right_shared_arrays",
     [] {
       std::vector<float> out(3 * kBlock);
       PYADV_LAUNCH((count_threads<float, true>), 3, kBlock, 0, nullptr, out.data());
       return all_equal(out, 1.0f * kBlock);
     }},
    {"shared_array_not_initialised",
     [] {
       std::vector<double> out(kBlock);
       PYADV_LAUNCH((count_threads<double, false>), 1, kBlock, 0, nullptr, out.data());
       return all_equal(out, 1.0 * kBlock);
     }},
    {"right_dynamic_shared",
     [] {
       std::vector<float> out(64);
       PYADV_LAUNCH((dynamic_sum<true>), 1, 64, 4, nullptr, numbers(64).data(), out.data());
       return all_equal(out, 64 * 65 / 2.0f);
     }},
    {"dynamic_shared_not_initialised",
     [] {
       std::vector<float> out(64);
       PYADV_LAUNCH((dynamic_sum<false>), 1, 64, 4, nullptr, numbers(64).data(), out.data());
       return all_equal(out, 64 * 65 / 2.0f);
     }},
    {"dynamic_shared_overflow",
     [] {
       PYADV_LAUNCH(dynamic_overflow, 1, 32, 32 * sizeof(float), nullptr);
       return true;
     }},
    {"shared_array_overflow",
     [] {
       float out;
       PYADV_LAUNCH(shared_overflow, 1, kBlock, 0, nullptr, &out, 1);
       return true;
     }},
    {"read_past_the_end",
     [] {
       std::vector<float> in(63), out(64);
       PYADV_LAUNCH(copy_fours, 1, 32, 0, nullptr, in.data(), out.data(), 63);
       return true;
     }},
    {"misaligned_access",
     [] {
       std::vector<float> in(64), out(64);
       PYADV_LAUNCH(copy_fours, 1, 32, 0, nullptr, in.data() + 1, out.data(), 60);
       return true;
     }},
    {"index_overflow",
     [] {
       std::vector<int> out(32);
       PYADV_LAUNCH(index_overflow, 1, 32, 0, nullptr, out.data(), 1 << 20);
       return true;
     }},
    {"return_before_shuffle",
     [] {
       std::vector<float> out(kBlock);
       PYADV_LAUNCH(return_before_shuffle, 1, kBlock, 0, nullptr, out.data());
       return true;
     }},
    {"caller_not_in_mask",
     [] {
       std::vector<float> out(32);
       PYADV_LAUNCH(caller_not_in_mask, 1, 32, 0, nullptr, out.data());
       return true;
     }},
    {"source_not_in_mask",
     [] {
       std::vector<float> out(32);
       PYADV_LAUNCH(source_not_in_mask, 1, 32, 0, nullptr, out.data());
       return true;
     }},
    {"mask_beyond_the_block",
     [] {
       int wrong = 0;
       PYADV_LAUNCH(collectives, 1, 48, 0, nullptr, &wrong);
       return true;
     }},
    {"collectives_do_not_match",
     [] {
       std::vector<int> out(32);
       PYADV_LAUNCH(collectives_do_not_match, 1, 32, 0, nullptr, out.data());
       return true;
     }},
    {"masks_do_not_match",
     [] {
       std::vector<int> out(32);
       PYADV_LAUNCH(masks_do_not_match, 1, 32, 0, nullptr, out.data());
       return true;
     }},
    {"different_barriers",
     [] {
       PYADV_LAUNCH(different_barriers, 1, 64, 0, nullptr);
       return true;
     }},
    {"return_before_barrier",
     [] {
       PYADV_LAUNCH(return_before_barrier, 1, kBlock, 0, nullptr);
       return true;
     }},
    {"count_on_earlier_block",
     [] {
       std::vector<float> sums(65);
       PYADV_LAUNCH(count_on_earlier_block, 64, 32, 0, nullptr, sums.data());
       return sums[64] == 64.0f;
     }},
    {"right_collectives",
     [] {
       int wrong = 0;
       for (const dim3 block : {dim3(32), dim3(128), dim3(16, 4, 2), dim3(1024)})
         PYADV_LAUNCH(collectives, dim3(1, 2), block, 0, nullptr, &wrong);
       return wrong == 0;
     }},
    {"right_after_failure",
     [] {  // a failed launch does not affect later ones
       try {
         PYADV_LAUNCH(return_before_barrier, 1, kBlock, 0, nullptr);
       } catch (const std::runtime_error&) {
         return kCases.at("right_collectives")() && kCases.at("right_barriers")();
       }
       return false;
     }},
    {"right_cluster", [] { return sums_ranks<true, true>(); }},
    {"no_cluster_barrier_before_read", [] { return sums_ranks<false, true>(); }},
    {"no_cluster_barrier_before_return", [] { return sums_ranks<true, false>(); }},
    {"one_block_skips_the_barrier",
     [] {
       PYADV_LAUNCH_CLUSTER(one_block_skips_the_barrier, 2, 4, 32, 0, nullptr);
       return true;
     }},
    {"no_such_block",
     [] {
       float out;
       PYADV_LAUNCH_CLUSTER(no_such_block, 2, 2, 32, 0, nullptr, &out);
       return true;
     }},
    {"right_copy",
     [] {
       return keeps([](auto in, auto out) {
         PYADV_LAUNCH((copy_through_shared<true>), 1, kBlock / 4, 4 * kBlock, nullptr, in, out);
       });
     }},
    {"copy_not_waited_for",
     [] {
       return keeps([](auto in, auto out) {
         PYADV_LAUNCH((copy_through_shared<false>), 1, kBlock / 4, 4 * kBlock, nullptr, in, out);
       });
     }},
    {"right_limits",
     [] {
       const auto refuses = [](dim3 grid, dim3 block, int shared, cudaError_t error) {
         PYADV_LAUNCH(nothing, grid, block, shared, nullptr);
         return cudaGetLastError() == error && cudaGetLastError() == cudaSuccess;
       };
       constexpr int kLimit = 227 << 10;
       return refuses(0, 32, 0, cudaErrorInvalidConfiguration) &&
              refuses(1, 0, 0, cudaErrorInvalidConfiguration) &&
              refuses(1, 1025, 0, cudaErrorInvalidConfiguration) &&
              refuses(1, dim3(32, 33), 0, cudaErrorInvalidConfiguration) &&
              refuses(1, dim3(1, 1, 65), 0, cudaErrorInvalidConfiguration) &&
              refuses(dim3(1, 65536), 1, 0, cudaErrorInvalidConfiguration) &&
              refuses(1, 1, (48 << 10) + 1, cudaErrorInvalidValue) &&
              cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kLimit + 1) == cudaErrorInvalidValue &&
              cudaGetLastError() == cudaErrorInvalidValue &&
              cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, kLimit) ==
                  cudaSuccess &&
              refuses(1, 1, kLimit, cudaSuccess) &&
              refuses(1, 1, kLimit + 1, cudaErrorInvalidValue) &&
              refuses(dim3(70000, 2), 1, 0, cudaSuccess);
     }},
};

}  // namespace
}  // namespace cuda
}  // namespace pyadv

extern "C" void run(const char* name) {
  try {
    puts(pyadv::cuda::kCases.at(name)() ? "right" : "wrong values");
  } catch (const std::runtime_error& error) {
    puts(error.what());
  }
  fflush(stdout);
}
