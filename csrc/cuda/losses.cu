#include "common/losses.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/team.cuh"

namespace pyadv {
namespace cuda {
namespace {

template <class C>
__device__ __forceinline__ C at(const void* values, int64_t i, C absent) {
  return values == nullptr ? absent : static_cast<const C*>(values)[i];
}

// Finds the best K classes of a row and returns whether it has an answer.
template <bool kBlock, int K, class T, class C>
__device__ __forceinline__ bool best_of(const T* row, int64_t n, Top<C, K>& top) {
  top.clear();
  C most = -kInf<C>;
  read_row<kBlock>(row, n, [&](int64_t k, C z) {
    top.insert({z, k});
    most = nan_max(most, z);
  });
  Team<kBlock>::reduce(top);
  return is_finite(Team<kBlock>::reduce(most, -kInf<C>, Max{}));
}

// Sums the exponentials of two rows, given their maxima.
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

template <bool kBlock, class C>
__device__ __forceinline__ void write_value(const AttackArgs& a, int64_t i, C value, bool correct) {
  if (Team<kBlock>::lane() != 0) return;
  static_cast<C*>(a.value)[i] = value;
  a.correct[i] = correct;
}

// Writes a row whose gradient is zero.
template <bool kBlock, class T, class C>
__device__ __forceinline__ void write_still(const AttackArgs& a, int64_t i, C value, bool correct) {
  fill_row<kBlock>(static_cast<T*>(a.grad) + i * a.classes, a.classes, C(0));
  write_value<kBlock>(a, i, value, correct);
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
    const bool answered = best_of<kBlock>(z, n, top), correct = answered && top.at[0].index == y;
    if (!answered || !is_class(y, n) || !is_class(t, n)) {
      write_still<kBlock, T>(a, i, kNaN<C>, correct);
      continue;
    }
    const C base = finite_base(top.other_than(t).value);
    C sum = C(0);
    read_row<kBlock>(z, n,
                     [&](int64_t k, C z_k) { sum += k == t ? C(0) : exp_nonpositive(z_k - base); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    const OthersLoss<C> loss(a.loss, a.unit, widen(z[y]), widen(z[t]), base, sum);
    write_value<kBlock>(a, i, loss.value, correct);
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
    const bool answered = best_of<kBlock>(z, n, top), correct = answered && top.at[0].index == y;
    if (!answered || !is_class(y, n) || !is_class(t, n)) {
      write_still<kBlock, T>(a, i, kNaN<C>, correct);
      continue;
    }
    const Loss loss(a.loss, a.unit, {widen(z[y]), y}, {widen(z[t]), t}, top);
    write_value<kBlock>(a, i, loss.value, correct);
    write_row<kBlock>(z, grad, n, [&](int64_t k, C) {
      C entry = C(0);
#pragma unroll
      for (int e = 0; e < Loss::kEntries; ++e) entry = loss.index[e] == k ? loss.entry[e] : entry;
      return entry;
    });
  }
}

// KL(q || p) and p - q. Where both are confident of one class, rounding loses their difference
// there, so the entry of the natural prediction is minus the sum of the others.
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
    C largest[2] = {-kInf<C>, -kInf<C>};
    read_rows<kBlock>(u, z, n, [&](int64_t k, C u_k, C z_k) {
      top_u.insert({u_k, k});
      top_z.insert({z_k, k});
      largest[0] = nan_max(largest[0], u_k);
      largest[1] = nan_max(largest[1], z_k);
    });
    Team<kBlock>::reduce(top_u);
    Team<kBlock>::reduce(top_z);
    Team<kBlock>::reduce(largest, -kInf<C>, Max{});
    const bool correct = is_finite(largest[1]) && top_z.at[0].index == y;
    if (!is_finite(largest[0]) || !is_finite(largest[1]) || !is_class(y, n)) {
      write_still<kBlock, T>(a, i, kNaN<C>, correct);
      continue;
    }
    C sum[2];
    sums_of<kBlock>(u, z, n, top_u.at[0].value, top_z.at[0].value, sum);
    const Softmax<C> natural(top_u.at[0].value, sum[0]), adversarial(top_z.at[0].value, sum[1]);
    const int64_t top = top_u.at[0].index;
    C total[2] = {C(0), C(0)};
    C most = C(0);
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
    const bool infinite = !is_finite(total[0]);
    if (infinite || !in_play(widen(z[y]))) {
      write_still<kBlock, T>(a, i, infinite ? kInf<C> : total[0], correct);
      continue;
    }
    const C multiple = a.unit && most > C(0) ? C(1) / most : C(1);
    write_value<kBlock>(a, i, total[0], correct);
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

// Writes one value and one gradient over a whole row, where a differentiable loss computes none.
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
    if (!is_finite(nan_max(z_y, others))) {
      write_instead<kBlock, T>(a, i, kNaN<C>, kNaN<C>);
      continue;
    }
    const C base = finite_base(others);
    C sum = C(0);
    read_row<kBlock>(z, n,
                     [&](int64_t k, C z_k) { sum += k == y ? C(0) : exp_nonpositive(z_k - base); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    const OthersLoss<C> loss(AttackLoss::CE, false, z_y, z_y, base, sum);
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
    const C base = Team<kBlock>::reduce(most, -kInf<C>, Max{});
    if (!is_finite(base)) {
      write_instead<kBlock, T>(a, i, kNaN<C>, kNaN<C>);
      continue;
    }
    C sum[3] = {C(0), C(0), C(0)};
    read_row<kBlock>(z, n, [&](int64_t k, C z_k) {
      sum[0] += exp_nonpositive(z_k - base);
      sum[1] += y[k];
      // A target of 0 adds nothing, also where its class is out of play.
      sum[2] += y[k] == C(0) ? C(0) : y[k] * (z_k - base);
    });
    Team<kBlock>::reduce(sum, C(0), Add{});
    const Softmax<C> softmax(base, sum[0]);
    const C w = at(a.weight, i, C(1));
    if (std::fabs(sum[2]) == kInf<C>) {
      write_instead<kBlock, T>(a, i, w * kInf<C>, C(0));
      continue;
    }
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
    const C z_y = widen(z[y]);
    if (!is_finite(most) || !in_play(z_y)) {
      const C value = is_finite(most) ? kInf<C> : kNaN<C>;
      write_instead<kBlock, T>(a, i, value, is_finite(most) ? C(0) : kNaN<C>);
      continue;
    }
    const Candidate<C> m = top.other_than(y);
    const C base = top.other_than(m.index).value;  // finite: the label is in play
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
    if (!is_finite(most[0]) || !is_finite(most[1])) {
      write_instead<kBlock, T>(a, i, kNaN<C>, kNaN<C>);
      continue;
    }
    C sum[2];
    sums_of<kBlock>(u, z, n, most[0], most[1], sum);
    const Softmax<C> natural(most[0], sum[0]), adversarial(most[1], sum[1]);
    C total[3] = {C(0), C(0), C(0)};
    read_rows<kBlock>(u, z, n, [&](int64_t k, C u_k, C z_k) {
      const KLTerm<C> term(natural, adversarial, u_k, z_k, natural.e(u_k), adversarial.e(z_k),
                           tiny);
      total[0] += term.q * term.log_ratio;
      total[1] += term.q * term.kept;
      total[2] += k == y ? C(0) : term.q;
    });
    Team<kBlock>::reduce(total, C(0), Add{});
    if (!is_finite(total[0])) {
      write_instead<kBlock, T>(a, i, kInf<C>, C(0));
      continue;
    }
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
  for (int64_t i = Team<kBlock>::first_row(); i < a.rows; i += Team<kBlock>::row_step()) {
    const T* z = a.logits.row<T>(i);
    // The sum of the exponentials, and the number of classes that are not out of play.
    C most = -kInf<C>, sum[2] = {C(0), C(0)};
    read_row<kBlock>(z, n, [&](int64_t, C z_k) { most = nan_max(most, z_k); });
    most = Team<kBlock>::reduce(most, -kInf<C>, Max{});
    read_row<kBlock>(z, n, [&](int64_t, C z_k) {
      sum[0] += exp_nonpositive((z_k - most) * inverse);
      sum[1] += C(z_k != -kInf<C>);
    });
    Team<kBlock>::reduce(sum, C(0), Add{});
    const C multiple = C(1) / sum[0], mean = a.center ? C(1) / sum[1] : C(0);
    write_row<kBlock>(z, static_cast<T*>(a.out) + i * n, n, [&](int64_t, C z_k) {
      const C value = exp_nonpositive((z_k - most) * inverse) * multiple;
      return z_k == -kInf<C> ? value : value - mean;
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
    const bool answered = best_of<kBlock>(z, n, top);
    C sum = C(0);
    if (answered)
      read_row<kBlock>(z, n,
                       [&](int64_t, C z_k) { sum += exp_nonpositive(z_k - top.at[0].value); });
    sum = Team<kBlock>::reduce(sum, C(0), Add{});
    if (Team<kBlock>::lane() != 0) continue;
    if (!answered) {
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
