#include "common/losses.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// A team of threads works on one row: a warp on a short one, a block on a long one. Each pass over
// the row reads it again, from the cache but for the first time.
constexpr int64_t kWarpClasses = 1024;

template <bool kBlock>
struct Team {
  static constexpr int kWidth = kBlock ? kThreads : static_cast<int>(kWarp);
  static constexpr int kTeams = kThreads / kWidth;  // of a block

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWidth; }
  __device__ static int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * kTeams + static_cast<int>(threadIdx.x) / kWidth;
  }
  __device__ static int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kTeams; }

  template <int K, class V, class Op>
  __device__ static __forceinline__ void reduce(V (&v)[K], V identity, Op op) {
    if (kBlock) {
      block_reduce(v, identity, op);
    } else {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = warp_reduce(v[k], op);
    }
  }
  template <class V, class Op>
  __device__ static __forceinline__ V reduce(V v, V identity, Op op) {
    V values[1] = {v};
    reduce(values, identity, op);
    return values[0];
  }

  // The best of all threads' tops; their classes are disjoint.
  template <class C, int K>
  __device__ static __forceinline__ void reduce(Top<C, K>& top) {
    exchange(top);
    if (!kBlock) return;
    constexpr int kWarps = kThreads / static_cast<int>(kWarp);
    __shared__ Top<C, K> partial[kWarps];
    const int warp = static_cast<int>(threadIdx.x / kWarp), in_warp = threadIdx.x % kWarp;
    if (in_warp == 0) partial[warp] = top;
    __syncthreads();
    top.clear();
    if (in_warp < kWarps) top = partial[in_warp];
    exchange(top);
    __syncthreads();  // `partial` may be written again
  }

  // body(k, Width<N>): the N classes from k on, N = V where `vectors` (all rows begin on a 16-byte
  // boundary), else 1.
  template <int V, class Body>
  __device__ static __forceinline__ void each(int64_t n, bool vectors, const Body& body) {
    int64_t first = 0;
    if (vectors) {
      first = n - n % V;
      for (int64_t k = static_cast<int64_t>(lane()) * V; k < first; k += kWidth * V)
        body(k, Width<V>{});
    }
    for (int64_t k = first + lane(); k < n; k += kWidth) body(k, Width<1>{});
  }

  template <int N>
  struct Width {
    static constexpr int value = N;
  };

 private:
  template <class C, int K>
  __device__ static __forceinline__ void exchange(Top<C, K>& top) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      Top<C, K> theirs;
#pragma unroll
      for (int k = 0; k < K; ++k)
        theirs.at[k] = {__shfl_xor_sync(0xffffffffu, top.at[k].value, lanes),
                        __shfl_xor_sync(0xffffffffu, top.at[k].index, lanes)};
#pragma unroll
      for (int k = 0; k < K; ++k) top.insert(theirs.at[k]);
    }
  }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class... P>
__device__ __forceinline__ bool aligned(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// body(k, z_k) for the classes of a row.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void read_row(const T* row, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(row), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(row + k);
#pragma unroll
    for (int j = 0; j < N; ++j) body(k + j, widen(v.v[j]));
  });
}

// out_k = body(k, z_k), rounded.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void write_row(const T* row, T* out, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(row, out), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> v = *reinterpret_cast<const Vec<T, N>*>(row + k);
    Vec<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.v[j] = narrow<T>(body(k + j, widen(v.v[j])));
    *reinterpret_cast<Vec<T, N>*>(out + k) = result;
  });
}

template <bool kBlock, class T, class C>
__device__ __forceinline__ void fill_row(T* out, int64_t n, C value) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(out), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    Vec<T, N> v;
#pragma unroll
    for (int j = 0; j < N; ++j) v.v[j] = narrow<T>(value);
    *reinterpret_cast<Vec<T, N>*>(out + k) = v;
  });
}

// body(k, u_k, z_k) for the classes of two rows.
template <bool kBlock, class T, class Body>
__device__ __forceinline__ void read_rows(const T* u, const T* z, int64_t n, const Body& body) {
  Team<kBlock>::template each<kVector<T>>(n, aligned(u, z), [&](int64_t k, auto width) {
    constexpr int N = decltype(width)::value;
    const Vec<T, N> a = *reinterpret_cast<const Vec<T, N>*>(u + k);
    const Vec<T, N> b = *reinterpret_cast<const Vec<T, N>*>(z + k);
#pragma unroll
    for (int j = 0; j < N; ++j) body(k + j, widen(a.v[j]), widen(b.v[j]));
  });
}

template <class C>
__device__ __forceinline__ C at(const void* values, int64_t i, C absent) {
  return values == nullptr ? absent : static_cast<const C*>(values)[i];
}

// The best K classes of a row, and whether all its logits are finite.
template <bool kBlock, int K, class T, class C>
__device__ __forceinline__ bool best_of(const T* row, int64_t n, Top<C, K>& top) {
  top.clear();
  C most = C(0);
  read_row<kBlock>(row, n, [&](int64_t k, C z) {
    top.insert({z, k});
    most = nan_max(most, C(std::fabs(z)));
  });
  Team<kBlock>::reduce(top);
  return is_finite(Team<kBlock>::reduce(most, C(0), Max{}));
}

// The softmax of two rows, by their maxima.
template <bool kBlock, class T, class C>
__device__ __forceinline__ void sums_of(const T* u, const T* z, int64_t n, C base_u, C base_z,
                                        C (&sum)[2]) {
  sum[0] = sum[1] = C(0);
  read_rows<kBlock>(u, z, n, [&](int64_t, C u_k, C z_k) {
    sum[0] += exp_nonpositive(u_k - base_u);
    sum[1] += exp_nonpositive(z_k - base_z);
  });
  Team<kBlock>::reduce(sum, C(0), Add{});
}

// What is left of a row whose loss does not exist.
template <bool kBlock, class T>
__device__ __forceinline__ void write_unusable(const AttackArgs& a, int64_t i) {
  using C = compute_t<T>;
  fill_row<kBlock>(static_cast<T*>(a.grad) + i * a.classes, a.classes, C(0));
  if (Team<kBlock>::lane() == 0) {
    static_cast<C*>(a.value)[i] = kNaN<C>;
    a.correct[i] = false;
  }
}

template <class C>
__device__ __forceinline__ void write_value(const AttackArgs& a, int64_t i, C value, bool correct) {
  static_cast<C*>(a.value)[i] = value;
  a.correct[i] = correct;
}

// "ce", "slm", "ce_targeted"
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) others_kernel(AttackArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    T* grad = static_cast<T*>(a.grad) + i * n;
    const int64_t y = a.y[i], t = is_targeted(a.loss) ? a.target[i] : y;
    Top<C, 2> top;
    if (!best_of<kBlock>(z, n, top) || !is_class(y, n) || !is_class(t, n)) {
      write_unusable<kBlock, T>(a, i);
      continue;
    }
    const C base = top.other_than(t).value;
    C sum = C(0);
    read_row<kBlock>(z, n,
                     [&](int64_t k, C z_k) { sum += k == t ? C(0) : exp_nonpositive(z_k - base); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    const OthersLoss<C> loss(a.loss, a.unit, widen(z[t]), base, sum);
    if (Team<kBlock>::lane() == 0) write_value(a, i, loss.value, top.at[0].index == y);
    write_row<kBlock>(z, grad, n, [&](int64_t k, C z_k) {
      return k == t ? loss.at_t : loss.multiple * exp_nonpositive(z_k - base);
    });
  }
}

// The margins and DLR.
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) sparse_kernel(AttackArgs a) {
  using C = compute_t<T>;
  using Loss = SparseLoss<C>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    T* grad = static_cast<T*>(a.grad) + i * n;
    const int64_t y = a.y[i], t = is_targeted(a.loss) ? a.target[i] : y;
    Top<C, 4> top;
    if (!best_of<kBlock>(z, n, top) || !is_class(y, n) || !is_class(t, n)) {
      write_unusable<kBlock, T>(a, i);
      continue;
    }
    const Loss loss(a.loss, a.unit, {widen(z[y]), y}, {widen(z[t]), t}, top);
    if (Team<kBlock>::lane() == 0) write_value(a, i, loss.value, top.at[0].index == y);
    write_row<kBlock>(z, grad, n, [&](int64_t k, C) {
      C entry = C(0);
#pragma unroll
      for (int e = 0; e < Loss::kEntries; ++e) entry = loss.index[e] == k ? loss.entry[e] : entry;
      return entry;
    });
  }
}

// KL(q || p) and p - q, with the entry of the natural prediction as minus the sum of the others:
// where both are confident of it, the difference there is lost in rounding.
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) attack_kl_kernel(AttackArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T *z = a.logits.row<T>(i), *u = a.natural.row<T>(i);
    T* grad = static_cast<T*>(a.grad) + i * n;
    const int64_t y = a.y[i];
    Top<C, 1> top_u, top_z;
    top_u.clear();
    top_z.clear();
    C most = C(0);
    read_rows<kBlock>(u, z, n, [&](int64_t k, C u_k, C z_k) {
      top_u.insert({u_k, k});
      top_z.insert({z_k, k});
      most = nan_max(most, nan_max(C(std::fabs(u_k)), C(std::fabs(z_k))));
    });
    Team<kBlock>::reduce(top_u);
    Team<kBlock>::reduce(top_z);
    if (!is_finite(Team<kBlock>::reduce(most, C(0), Max{})) || !is_class(y, n)) {
      write_unusable<kBlock, T>(a, i);
      continue;
    }
    C sum[2];
    sums_of<kBlock>(u, z, n, top_u.at[0].value, top_z.at[0].value, sum);
    const Softmax<C> natural(top_u.at[0].value, sum[0]), adversarial(top_z.at[0].value, sum[1]);
    const int64_t top = top_u.at[0].index;
    C total[2] = {C(0), C(0)};
    most = C(0);
    read_rows<kBlock>(u, z, n, [&](int64_t k, C u_k, C z_k) {
      const KLTerm<C> term(natural, adversarial, u_k, z_k, natural.e(u_k), adversarial.e(z_k),
                           false);
      const C difference = k == top ? C(0) : term.p - term.q;
      total[0] += term.q * term.log_ratio;
      total[1] += difference;
      most = nan_max(most, C(std::fabs(difference)));
    });
    Team<kBlock>::reduce(total, C(0), Add{});
    most = nan_max(Team<kBlock>::reduce(most, C(0), Max{}), C(std::fabs(total[1])));
    const C multiple = a.unit && most > C(0) ? C(1) / most : C(1);
    if (Team<kBlock>::lane() == 0) write_value(a, i, total[0], top_z.at[0].index == y);
    write_row<kBlock>(z, grad, n, [&](int64_t k, C z_k) {
      const C q = natural.e(widen(u[k])) * natural.inverse_sum;
      const C p = adversarial.e(z_k) * adversarial.inverse_sum;
      return multiple * (k == top ? -total[1] : p - q);
    });
  }
}

template <bool kBlock, class C>
__device__ __forceinline__ void write_value(const LossArgs& a, int64_t i, C value) {
  if (a.value != nullptr && Team<kBlock>::lane() == 0) static_cast<C*>(a.value)[i] = value;
}

// What the differentiable losses write for a row that is not computed.
template <bool kBlock, class T, class C>
__device__ __forceinline__ void write_instead(const LossArgs& a, int64_t i, C value, C gradient) {
  const int64_t n = a.classes;
  write_value<kBlock>(a, i, value);
  if (a.grad != nullptr) fill_row<kBlock>(static_cast<T*>(a.grad) + i * n, n, gradient);
  if (a.grad_natural != nullptr)
    fill_row<kBlock>(static_cast<T*>(a.grad_natural) + i * n, n, gradient);
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(LossArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    T* grad = static_cast<T*>(a.grad) + i * n;
    const int64_t y = a.y[i];
    if (a.ignores && y == a.ignored) {
      write_instead<kBlock, T>(a, i, C(0), C(0));
      continue;
    }
    if (!is_class(y, n)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, C(0));
      continue;
    }
    C others = -kInf<C>;
    read_row<kBlock>(z, n,
                     [&](int64_t k, C z_k) { others = nan_max(others, k == y ? -kInf<C> : z_k); });
    others = Team<kBlock>::reduce(others, -kInf<C>, Max{});
    const C z_y = widen(z[y]), w = at(a.weight, i, C(1));
    if (!is_usable(z_y, others)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, kNaN<C>);
      continue;
    }
    const C base = finite_base(others);
    C sum = C(0);
    read_row<kBlock>(z, n,
                     [&](int64_t k, C z_k) { sum += k == y ? C(0) : exp_nonpositive(z_k - base); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    const OthersLoss<C> loss(AttackLoss::CE, false, z_y, base, sum);
    write_value<kBlock>(a, i, w * loss.value);
    if (a.grad == nullptr) continue;
    const C scale = w * at(a.cotangent, i, C(1)), multiple = scale * loss.multiple;
    write_row<kBlock>(z, grad, n, [&](int64_t k, C z_k) {
      return k == y ? scale * loss.at_t : multiple * exp_nonpositive(z_k - base);
    });
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) soft_cross_entropy_kernel(LossArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    const C* y = static_cast<const C*>(a.soft) + i * n;
    C most = -kInf<C>;
    read_row<kBlock>(z, n, [&](int64_t, C z_k) { most = nan_max(most, z_k); });
    const C base = finite_base(Team<kBlock>::reduce(most, -kInf<C>, Max{}));
    C sum[3] = {C(0), C(0), C(0)};
    read_row<kBlock>(z, n, [&](int64_t k, C z_k) {
      sum[0] += exp_nonpositive(z_k - base);
      sum[1] += y[k];
      sum[2] += y[k] * (z_k - base);
    });
    Team<kBlock>::reduce(sum, C(0), Add{});
    const Softmax<C> softmax(base, sum[0]);
    const C w = at(a.weight, i, C(1));
    write_value<kBlock>(a, i, -w * (sum[2] - sum[1] * softmax.log_sum));
    if (a.grad == nullptr) continue;
    const C scale = w * at(a.cotangent, i, C(1)), of_p = sum[1] * softmax.inverse_sum;
    write_row<kBlock>(z, static_cast<T*>(a.grad) + i * n, n,
                      [&](int64_t k, C z_k) { return scale * (of_p * softmax.e(z_k) - y[k]); });
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) mart_bce_kernel(LossArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    const int64_t y = a.y[i];
    if (!is_class(y, n)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, C(0));
      continue;
    }
    Top<C, 2> top;
    top.clear();
    C most = -kInf<C>;
    read_row<kBlock>(z, n, [&](int64_t k, C z_k) {
      top.insert({z_k, k});
      most = nan_max(most, z_k);
    });
    Team<kBlock>::reduce(top);
    most = Team<kBlock>::reduce(most, -kInf<C>, Max{});
    if (!is_usable(most, most)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, kNaN<C>);
      continue;
    }
    const Candidate<C> m = top.other_than(y);
    const C base = finite_base(top.other_than(m.index).value), z_y = widen(z[y]);
    C rest = C(0);
    read_row<kBlock>(z, n, [&](int64_t k, C z_k) {
      rest += k == y || k == m.index ? C(0) : exp_nonpositive(z_k - base);
    });
    rest = Team<kBlock>::reduce(rest, C(0), Add{});
    const MartBCE<C> loss(a.exact, z_y, m.value, base, rest);
    write_value<kBlock>(a, i, loss.value);
    if (a.grad == nullptr) continue;
    const C scale = at(a.cotangent, i, C(1));
    write_row<kBlock>(z, static_cast<T*>(a.grad) + i * n, n, [&](int64_t k, C z_k) {
      return scale * (k == y         ? loss.at_y
                      : k == m.index ? loss.at_m
                                     : loss.others * exp_nonpositive(z_k - base));
    });
  }
}

// trades_kl and mart_kl.
template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) kl_kernel(LossArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  const bool tiny = a.y != nullptr && !a.exact;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T *z = a.logits.row<T>(i), *u = a.natural.row<T>(i);
    const int64_t y = a.y != nullptr ? a.y[i] : 0;
    if (!is_class(y, n)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, C(0));
      continue;
    }
    C most[2] = {-kInf<C>, -kInf<C>};
    read_rows<kBlock>(u, z, n, [&](int64_t, C u_k, C z_k) {
      most[0] = nan_max(most[0], u_k);
      most[1] = nan_max(most[1], z_k);
    });
    Team<kBlock>::reduce(most, -kInf<C>, Max{});
    const C base_u = finite_base(most[0]), base_z = finite_base(most[1]);
    C sum[2];
    sums_of<kBlock>(u, z, n, base_u, base_z, sum);
    const Softmax<C> natural(base_u, sum[0]), adversarial(base_z, sum[1]);
    C total[3] = {C(0), C(0), C(0)};
    read_rows<kBlock>(u, z, n, [&](int64_t k, C u_k, C z_k) {
      const KLTerm<C> term(natural, adversarial, u_k, z_k, natural.e(u_k), adversarial.e(z_k),
                           tiny);
      total[0] += term.q * term.log_ratio;
      total[1] += term.q * term.kept;
      total[2] += k == y ? C(0) : term.q;
    });
    Team<kBlock>::reduce(total, C(0), Add{});
    const C q_y = natural.e(widen(u[y])) * natural.inverse_sum;
    const KLRow<C> row(a, total[0], tiny ? total[1] : C(1), q_y, total[2],
                       at(a.cotangent, i, C(1)));
    write_value<kBlock>(a, i, row.value);
    if (a.grad == nullptr) continue;
    T* to_z = static_cast<T*>(a.grad) + i * n;
    T* to_u = static_cast<T*>(a.grad_natural) + i * n;
    Team<kBlock>::template each<kVector<T>>(n, aligned(u, z, to_u, to_z), [&](int64_t k, auto w) {
      constexpr int N = decltype(w)::value;
      using Pack = Vec<T, N>;
      Pack vu = *reinterpret_cast<const Pack*>(u + k), vz = *reinterpret_cast<const Pack*>(z + k);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C u_k = widen(vu.v[j]), z_k = widen(vz.v[j]);
        const KLTerm<C> term(natural, adversarial, u_k, z_k, natural.e(u_k), adversarial.e(z_k),
                             tiny);
        vz.v[j] = narrow<T>(row.adversarial_gradient(term));
        vu.v[j] = narrow<T>(row.natural_gradient(term, a.y != nullptr && k + j == y));
      }
      *reinterpret_cast<Pack*>(to_z + k) = vz;
      *reinterpret_cast<Pack*>(to_u + k) = vu;
    });
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) softmax_kernel(SoftmaxArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  const C inverse = C(1) / static_cast<C>(a.temperature);
  const C mean = a.center ? C(1) / static_cast<C>(n) : C(0);
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    C most = -kInf<C>, sum = C(0);
    read_row<kBlock>(z, n, [&](int64_t, C z_k) { most = nan_max(most, z_k); });
    most = Team<kBlock>::reduce(most, -kInf<C>, Max{});
    read_row<kBlock>(z, n, [&](int64_t, C z_k) { sum += exp_nonpositive((z_k - most) * inverse); });
    const C multiple = C(1) / Team<kBlock>::reduce(sum, C(0), Add{});
    write_row<kBlock>(z, static_cast<T*>(a.out) + i * n, n, [&](int64_t, C z_k) {
      return exp_nonpositive((z_k - most) * inverse) * multiple - mean;
    });
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) row_stats_kernel(RowStatsArgs a) {
  using C = compute_t<T>;
  const int64_t n = a.classes;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    const int64_t y = a.y[i];
    const RowStats<C> stats(a, i);
    Top<C, 4> top;
    const bool finite = best_of<kBlock>(z, n, top);
    C sum = C(0);
    if (finite)
      read_row<kBlock>(z, n,
                       [&](int64_t, C z_k) { sum += exp_nonpositive(z_k - top.at[0].value); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    if (Team<kBlock>::lane() != 0) continue;
    if (!finite) {
      stats.write_unknown();
      continue;
    }
    stats.write_top(top);
    if (is_class(y, n))
      stats.write_margin(widen(z[y]), top.other_than(y), sum);
    else
      stats.write_no_margin();
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kThreads, 2) square_kernel(SquareArgs a) {
  using C = compute_t<T>;
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* g = static_cast<const T*>(a.data) + i * a.n;
    if (a.cotangent == nullptr) {
      C sum = C(0);
      read_row<kBlock>(g, a.n, [&](int64_t, C v) { sum += v * v; });
      sum = Team<kBlock>::reduce(sum, C(0), Add{});
      if (Team<kBlock>::lane() == 0) static_cast<C*>(a.out)[i] = sum;
      continue;
    }
    const C twice = C(2) * static_cast<const C*>(a.cotangent)[i];
    write_row<kBlock>(g, static_cast<T*>(a.out) + i * a.n, a.n,
                      [&](int64_t, C v) { return twice * v; });
  }
}

// Launches kernel<T, kBlock> with a team per row of `width` elements.
#define PYADV_LAUNCH_ROWS(kernel, args, width, stream)                                         \
  dispatch((args).dtype, [&](auto tag) {                                                       \
    using T = typename decltype(tag)::type;                                                    \
    if ((width) <= kWarpClasses)                                                               \
      PYADV_LAUNCH((kernel<T, false>), elementwise_blocks((args).rows * kWarp), kThreads, 0,   \
                   stream, args);                                                              \
    else                                                                                       \
      PYADV_LAUNCH((kernel<T, true>), elementwise_blocks((args).rows * kThreads), kThreads, 0, \
                   stream, args);                                                              \
    return static_cast<int>(cudaGetLastError());                                               \
  })

}  // namespace

int attack_loss(const AttackArgs& args, void* stream) {
  if (args.loss == AttackLoss::KL)
    return PYADV_LAUNCH_ROWS(attack_kl_kernel, args, args.classes, stream);
  if (is_sparse(args.loss)) return PYADV_LAUNCH_ROWS(sparse_kernel, args, args.classes, stream);
  return PYADV_LAUNCH_ROWS(others_kernel, args, args.classes, stream);
}

int weighted_cross_entropy(const LossArgs& args, void* stream) {
  if (args.soft != nullptr)
    return PYADV_LAUNCH_ROWS(soft_cross_entropy_kernel, args, args.classes, stream);
  return PYADV_LAUNCH_ROWS(cross_entropy_kernel, args, args.classes, stream);
}

int kl(const LossArgs& args, void* stream) {
  return PYADV_LAUNCH_ROWS(kl_kernel, args, args.classes, stream);
}

int mart_bce(const LossArgs& args, void* stream) {
  return PYADV_LAUNCH_ROWS(mart_bce_kernel, args, args.classes, stream);
}

int softmax_cotangent(const SoftmaxArgs& args, void* stream) {
  return PYADV_LAUNCH_ROWS(softmax_kernel, args, args.classes, stream);
}

int row_stats(const RowStatsArgs& args, void* stream) {
  return PYADV_LAUNCH_ROWS(row_stats_kernel, args, args.classes, stream);
}

int row_square_sum(const SquareArgs& args, void* stream) {
  return PYADV_LAUNCH_ROWS(square_kernel, args, args.n, stream);
}

}  // namespace cuda
}  // namespace pyadv
