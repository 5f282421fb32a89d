// Runs a row rule (common/rules.h). A short row has one block. On sm_90 the blocks of a cluster
// share a long row: each holds its part of the row in its shared memory, and they exchange partial
// sums through distributed shared memory. A rule's passes then read global memory once.
//
// How a row is split depends only on its size and type, and partial sums are added in a fixed
// order: a row's result depends neither on the other rows nor on chance.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"

namespace pyadv {
namespace cuda {

constexpr int kRowThreads = 512;
constexpr int kPacksPerThread = 4;  // several small blocks on a multiprocessor overlap their phases
constexpr int kMostSums = 4;
constexpr int64_t kStaticShared = 4 * 1024;  // more than the kernel's own shared variables

// One block's part of the row, in packs of V elements. kShared: a cluster shares the row.
template <class Rule, class T, int V, bool kShared>
class Row {
 public:
  using C = compute_t<T>;
  using Pack = Vec<T, V>;

  // `shared`: the block's dynamic shared memory.
  __device__ __forceinline__ Row(const RuleTensors& s, int64_t row, unsigned blocks,
                                 unsigned char* shared)
      : s_(s),
        first_(row * s.n),
        blocks_(blocks),
        shared_(reinterpret_cast<Pack*>(shared)),
        lo_(s.lo.at<C>(first_)),
        hi_(s.hi.at<C>(first_)) {
    const int64_t packs = s.n / V, part = (packs + blocks - 1) / blocks;
    const int64_t begin = kShared ? part * cluster_rank() : 0;
    begin_ = begin < packs ? begin : packs;
    end_ = begin_ + part < packs ? begin_ + part : packs;
  }

  __device__ __forceinline__ int64_t size() const { return s_.n; }

  // Copies the first `staged` packs of this part to shared memory: x_adv, x, grad, x_prev one after
  // the other. No barrier is needed, since each thread reads only the packs that it has copied.
  __device__ __forceinline__ void stage(int64_t staged) {
    slot_ = staged;
    staged_ = begin_ + staged < end_ ? begin_ + staged : end_;
    for (int64_t i = begin_ + threadIdx.x; i < staged_; i += blockDim.x) {
      Pack* to = shared_ + (i - begin_);
      copy(to, global(s_.x_adv) + i);
      copy(to + slot_, global(s_.x) + i);
      if (Rule::kGrad) copy(to + 2 * slot_, global(s_.grad) + i);
      if (Rule::kPrev) copy(to + 3 * slot_, global(s_.x_prev) + i);
    }
    if (V > 1) copies_wait();
  }

  template <int K, class L, class Term>
  __device__ __forceinline__ void sums(const Term& term, double (&total)[K]) const {
    static_assert(K <= kMostSums, "published holds kMostSums values");
    L mine[K] = {};
    each([&](const Element<C>& e, int64_t, int) {
      L t[K];
      term(e, t);
#pragma unroll
      for (int k = 0; k < K; ++k) mine[k] += t[k];
    });
#pragma unroll
    for (int k = 0; k < K; ++k) total[k] = mine[k];
    block_reduce(total, 0.0, Add{});
    reduce_in_cluster(total, Add{});
  }

  template <class Value>
  __device__ __forceinline__ C maximum(const Value& value) const {
    C most = 0;
    each([&](const Element<C>& e, int64_t, int) { most = nan_max(most, value(e)); });
    double total[1] = {static_cast<double>(block_reduce(most, C(0), Max{}))};
    reduce_in_cluster(total, Max{});
    return static_cast<C>(total[0]);
  }

  template <class Value>
  __device__ __forceinline__ void store(const Value& value) const {
    Pack result;
    each([&](const Element<C>& e, int64_t i, int k) {
      result.v[k] = narrow<T>(value(e));
      if (k == V - 1) out()[i] = result;
    });
  }

  __device__ __forceinline__ void copy_input() const {
    for (int64_t i = begin_ + threadIdx.x; i < end_; i += blockDim.x)
      out()[i] = global(s_.x_adv)[i];
  }

 private:
  // Calls f(element, pack, place in the pack) for this thread's elements, pack by pack.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int64_t i = begin_ + threadIdx.x; i < end_; i += blockDim.x) {
      const bool staged = i < staged_;
      const Pack* at = shared_ + (i - begin_);
      const Packs<Rule, T, V> packs =
          staged ? Packs<Rule, T, V>(at, at + 2 * slot_, at + slot_, at + 3 * slot_, 0)
                 : Packs<Rule, T, V>(global(s_.x_adv), global(s_.grad), global(s_.x),
                                     global(s_.x_prev), i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int64_t at_element = first_ + i * V + k;
        f(packs.template element<C>(k, s_.per_element ? s_.lo.at<C>(at_element) : lo_,
                                    s_.per_element ? s_.hi.at<C>(at_element) : hi_),
          i, k);
      }
    }
  }

  // Combines the blocks' values. Two buffers alternate, so that one barrier per call is enough: a
  // block overwrites a buffer only after the next call's barrier, when all have read it.
  template <int K, class Op>
  __device__ __forceinline__ void reduce_in_cluster(double (&v)[K], Op op) const {
    if (!kShared) return;
    __shared__ double published[2][kMostSums];
    double* mine = published[turn_];
    turn_ ^= 1;
    if (threadIdx.x == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) mine[k] = v[k];
    cluster_barrier();
    const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < K; ++k)
      v[k] = warp_reduce(lane < blocks_ ? cluster_read(mine + k, lane) : 0.0, op);
  }

  __device__ __forceinline__ static void copy(Pack* to, const Pack* from) {
    if (V > 1)
      copy_async16(to, from);
    else
      *to = *from;
  }

  // The row in a tensor. An absent tensor stays null, plus an offset that is never read.
  __device__ __forceinline__ const Pack* global(const void* tensor) const {
    return reinterpret_cast<const Pack*>(static_cast<const T*>(tensor) +
                                         (tensor == nullptr ? 0 : first_));
  }
  __device__ __forceinline__ Pack* out() const {
    return reinterpret_cast<Pack*>(static_cast<T*>(s_.out) + first_);
  }

  const RuleTensors& s_;
  int64_t first_, begin_, end_;
  unsigned blocks_;
  mutable unsigned turn_ = 0;
  Pack* shared_;
  C lo_, hi_;
  int64_t slot_ = 0, staged_ = -1;  // packs per slot; end of the staged packs
};

template <class Rule, class T, int V, bool kShared>
__global__ void __launch_bounds__(kRowThreads, 1)
    rows_kernel(typename Rule::Args s, unsigned blocks, int64_t staged) {
  PYADV_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t r = blockIdx.x / blocks;
  Row<Rule, T, V, kShared> row(s, r, blocks, shared);
  if (s.active != nullptr && !s.active[r]) return row.copy_input();
  if (staged > 0) row.stage(staged);
  Rule::template run<compute_t<T>>(row, s.template values_at<compute_t<T>>(r * s.n));
  if (kShared) cluster_barrier();  // the others may still read this block's sums
}

template <class Rule, class T, int V, bool kShared>
void launch_rows(const typename Rule::Args& s, unsigned blocks, void* stream) {
  constexpr int64_t kSlots = Rule::kPrev ? 4 : Rule::kGrad ? 3 : 2;
  constexpr int64_t kPack = kSlots * static_cast<int64_t>(sizeof(Vec<T, V>));
  const int64_t part = (s.n / V + blocks - 1) / blocks;
  // Without a cluster, a row that does not fit is read from global memory in every pass.
  int64_t staged = (most_shared_bytes() - kStaticShared) / kPack;
  if (staged > part) staged = part;
  if (!kShared && staged < part) staged = 0;
  const int64_t bytes = staged * kPack;
  if (bytes > 48 * 1024)
    cudaFuncSetAttribute(rows_kernel<Rule, T, V, kShared>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  const int64_t wanted = (part + kPacksPerThread - 1) / kPacksPerThread;
  const int64_t threads = wanted < kRowThreads ? (wanted + kWarp - 1) / kWarp * kWarp : kRowThreads;
  const unsigned grid = static_cast<unsigned>(s.rows) * blocks,
                 block = static_cast<unsigned>(threads);
  if (kShared)
    PYADV_LAUNCH_CLUSTER((rows_kernel<Rule, T, V, kShared>), blocks, grid, block,
                         static_cast<size_t>(bytes), stream, s, blocks, staged);
  else
    PYADV_LAUNCH((rows_kernel<Rule, T, V, kShared>), grid, block, static_cast<size_t>(bytes),
                 stream, s, blocks, staged);
}

// Clusters serve rows of 16- and 32-bit numbers in whole vectors. For others, which are rare, they
// would not be worth the third of the time that all of these kernels take to compile.
template <class Rule, class T, int V>
int split_rows(const typename Rule::Args& s, void* stream) {
  if constexpr (V > 1 && sizeof(T) <= sizeof(float)) {
    constexpr int64_t kSlots = Rule::kPrev ? 4 : Rule::kGrad ? 3 : 2;
    const int64_t bytes = kSlots * s.n * static_cast<int64_t>(sizeof(T));
    unsigned blocks = 1;
    while (blocks < kMostClusterBlocks && bytes > blocks * row_bytes_per_block()) blocks *= 2;
    if (blocks > 1 && runs_clusters(rows_kernel<Rule, T, V, true>)) {
      launch_rows<Rule, T, V, true>(s, blocks, stream);
      return static_cast<int>(cudaGetLastError());
    }
  }
  launch_rows<Rule, T, V, false>(s, 1, stream);
  return static_cast<int>(cudaGetLastError());
}

template <class Rule>
int run_rows(const typename Rule::Args& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    return aligned16(s.x_adv, s.grad, s.x, s.x_prev, s.out) && s.n % V == 0
               ? split_rows<Rule, T, V>(s, stream)
               : split_rows<Rule, T, 1>(s, stream);
  });
}

}  // namespace cuda
}  // namespace pyadv
