// Runs a row rule (common/rules.h) with one block per row. A row that fits is copied to shared
// memory first, so that the rule's passes read global memory once.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"

namespace pyadv {
namespace cuda {

constexpr int kRowThreads = 512;
constexpr int64_t kStageBytes = 48 * 1024;  // available to a block without an opt-in

// The `row` of a row rule, in packs of V elements.
template <class Rule, class T, int V>
class Row {
 public:
  using C = compute_t<T>;
  using Pack = Vec<T, V>;

  __device__ __forceinline__ Row(const RuleTensors& s, int64_t row) : s_(s), first_(row * s.n) {
    x_adv_ = static_cast<const T*>(s.x_adv) + first_;
    grad_ = static_cast<const T*>(s.grad) + (Rule::kGrad ? first_ : 0);
    x_ = static_cast<const T*>(s.x) + first_;
    x_prev_ = static_cast<const T*>(s.x_prev) + (Rule::kPrev ? first_ : 0);
    lo_ = s.lo.at<C>(first_);
    hi_ = s.hi.at<C>(first_);
  }

  __device__ __forceinline__ int64_t size() const { return s_.n; }

  // Copies the row's tensors to shared memory, one after the other. No barrier is needed: each
  // thread reads only the packs that it has copied itself.
  __device__ __forceinline__ void stage(T* shared) {
    Pack* to = reinterpret_cast<Pack*>(shared);
    const int64_t packs = s_.n / V;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const Packs<Rule, T, V> pack(x_adv_, grad_, x_, x_prev_, i);
      to[i] = pack.x_adv;
      to[packs + i] = pack.x;
      if (Rule::kGrad) to[2 * packs + i] = pack.grad;
      if (Rule::kPrev) to[3 * packs + i] = pack.x_prev;
    }
    x_adv_ = shared;
    x_ = shared + s_.n;
    if (Rule::kGrad) grad_ = shared + 2 * s_.n;
    if (Rule::kPrev) x_prev_ = shared + 3 * s_.n;
  }

  template <int K, class L, class Term>
  __device__ __forceinline__ void sums(const Term& term, double (&total)[K]) const {
    L mine[K] = {};
    each([&](const Element<C>& e, int64_t) {
      L t[K];
      term(e, t);
#pragma unroll
      for (int k = 0; k < K; ++k) mine[k] += t[k];
    });
#pragma unroll
    for (int k = 0; k < K; ++k) total[k] = mine[k];
    block_reduce(total, 0.0, Add{});
  }

  template <class Value>
  __device__ __forceinline__ C maximum(const Value& value) const {
    C most = 0;
    each([&](const Element<C>& e, int64_t) { most = nan_max(most, value(e)); });
    return block_reduce(most, C(0), Max{});
  }

  template <class Value>
  __device__ __forceinline__ void store(const Value& value) const {
    Pack result;
    each([&](const Element<C>& e, int64_t i) {
      result.v[i % V] = narrow<T>(value(e));
      if (i % V == V - 1) out()[i / V] = result;
    });
  }

  __device__ __forceinline__ void copy_input() const {
    for (int64_t i = threadIdx.x; i < s_.n / V; i += blockDim.x)
      out()[i] = reinterpret_cast<const Pack*>(x_adv_)[i];
  }

 private:
  // Calls f(element, index) for this thread's elements, V neighbours at a time.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int64_t i = threadIdx.x; i < s_.n / V; i += blockDim.x) {
      const Packs<Rule, T, V> packs(x_adv_, grad_, x_, x_prev_, i);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int64_t at = i * V + k;
        f(packs.template element<C>(k, s_.per_element ? s_.lo.at<C>(first_ + at) : lo_,
                                    s_.per_element ? s_.hi.at<C>(first_ + at) : hi_),
          at);
      }
    }
  }

  __device__ __forceinline__ Pack* out() const {
    return reinterpret_cast<Pack*>(static_cast<T*>(s_.out) + first_);
  }

  const RuleTensors& s_;
  int64_t first_;
  const T *x_adv_, *grad_, *x_, *x_prev_;
  C lo_, hi_;
};

template <class Rule, class T, int V>
__global__ void __launch_bounds__(kRowThreads, 1) rows_kernel(typename Rule::Args s, bool staged) {
  PYADV_DYNAMIC_SHARED(T, shared);
  const int64_t r = blockIdx.x;
  Row<Rule, T, V> row(s, r);
  if (s.active != nullptr && !s.active[r]) return row.copy_input();
  if (staged) row.stage(shared);
  Rule::template run<compute_t<T>>(row, s.template values_at<compute_t<T>>(r * s.n));
}

template <class Rule, class T, int V>
int launch_rows(const typename Rule::Args& s, void* stream) {
  // x_adv, x, grad and x_prev are copied to slots 0 to 3.
  const int64_t slots = Rule::kPrev ? 4 : Rule::kGrad ? 3 : 2;
  const int64_t bytes = slots * s.n * static_cast<int64_t>(sizeof(T));
  const bool staged = bytes <= kStageBytes;
  // The fewest threads for which no thread takes more turns than with kRowThreads.
  const int64_t packs = s.n / V, turns = (packs + kRowThreads - 1) / kRowThreads;
  const int64_t warps = (packs + turns * kWarp - 1) / (turns * kWarp);
  PYADV_LAUNCH((rows_kernel<Rule, T, V>), static_cast<unsigned>(s.rows),
               static_cast<unsigned>(warps * kWarp), staged ? static_cast<size_t>(bytes) : 0,
               stream, s, staged);
  return static_cast<int>(cudaGetLastError());
}

template <class Rule>
int run_rows(const typename Rule::Args& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    return aligned16(s.x_adv, s.grad, s.x, s.x_prev, s.out) && s.n % V == 0
               ? launch_rows<Rule, T, V>(s, stream)
               : launch_rows<Rule, T, 1>(s, stream);
  });
}

}  // namespace cuda
}  // namespace pyadv
