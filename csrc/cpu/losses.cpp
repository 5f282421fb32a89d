#include "common/losses.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/reduce.h"
#include "cpu/tile.h"
#include "cpu/widen.h"

namespace pyadv {
namespace cpu {
namespace {

// Loops over single rows widen each row into a buffer, which stays in the cache for later passes.
constexpr int64_t kWidest = 16;  // floats in a vector; buffers are padded so that exp needs no tail

inline int64_t padded(int64_t n) { return (n + kWidest - 1) / kWidest * kWidest; }

template <class C>
class Buffers {
 public:
  Buffers(int64_t classes, int64_t count) : stride_(padded(classes)), data_(stride_ * count) {}
  C* operator[](int64_t i) { return data_.data() + i * stride_; }

 private:
  int64_t stride_;
  std::vector<C> data_;
};

template <class C>
PYADV_HD C largest(const C* v, int64_t n) {
  return maximum(n, [v](int64_t k) PYADV_INLINE_LAMBDA { return v[k]; }, -kInf<C>);
}

// Loads a row and returns its largest logit: NaN if one is NaN, finite if the row has an answer.
template <class C>
PYADV_HD C load_largest(const C* row, C* v, int64_t n) {
  return maximum(n, [=](int64_t k) PYADV_INLINE_LAMBDA { return v[k] = row[k]; }, -kInf<C>);
}

// The first class with this value other than `skipped`, or `skipped` if there is none.
template <class C>
PYADV_HD int64_t first_with(const C* v, int64_t n, C value, int64_t skipped) {
  for (int64_t k = 0; k < n; ++k)
    if (v[k] == value && k != skipped) return k;
  return skipped;
}

template <int K, class C>
PYADV_HD Top<C, K> best(const C* v, int64_t n) {
  Top<C, K> top;
  top.clear();
  for (int64_t k = 0; k < n; ++k)
    if (!(v[k] < top.at[K - 1].value)) top.insert({v[k], k});
  return top;
}

template <class C>
PYADV_HD C sum_of(const C* v, int64_t n) {
  return static_cast<C>(sum<C>(n, [v](int64_t k) PYADV_INLINE_LAMBDA { return v[k]; }));
}

// Replaces v, which is padded, by exp(v - base) and returns the sum. The bits are those of sum_of.
template <class C>
PYADV_HD C exp_below(C* v, int64_t n, C base) {
  const int64_t whole = n - n % kLanes;
  double total = sum<C>(whole, [v, base](int64_t k) PYADV_INLINE_LAMBDA {
    return v[k] = exp_nonpositive(v[k] - base);
  });
  const int64_t end = padded(n);
  PYADV_INDEPENDENT
  for (int64_t k = whole; k < end; ++k) v[k] = exp_nonpositive(v[k] - base);
  for (int64_t k = whole; k < n; ++k) total += v[k];
  return static_cast<C>(total);
}

template <class C>
PYADV_HD void store_multiple(const C* v, C* out, int64_t n, C multiple) {
  PYADV_INDEPENDENT
  for (int64_t k = 0; k < n; ++k) out[k] = v[k] * multiple;
}

template <class C>
PYADV_HD void fill(C* out, int64_t n, C value) {
  std::fill(out, out + n, value);
}

// The softmax of v, whose maximum is `base`. Writes the exponentials to e.
template <class C>
PYADV_HD Softmax<C> softmax_of(const C* v, C* e, int64_t n, C base) {
  std::copy(v, v + n, e);
  return Softmax<C>(base, exp_below(e, n, base));
}

template <class C>
PYADV_HD C at(const void* values, int64_t i, C absent) {
  return values == nullptr ? absent : static_cast<const C*>(values)[i];
}

template <class C>
struct AttackLoop {
  PYADV_HD static void run(const AttackArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const AttackArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      C* grad = static_cast<C*>(a.grad) + i * n;
      C& value = static_cast<C*>(a.value)[i];
      const int64_t y = a.y[i], t = is_targeted(a.loss) ? a.target[i] : y;
      const C most = load_largest(a.logits.row<C>(i), z, n);
      bool usable = is_finite(most) && is_class(y, n);
      a.correct[i] = usable && z[y] == most && y == first_with(z, n, most, int64_t{-1});
      usable = usable && is_class(t, n);
      C most_natural = C(0);
      if (a.loss == AttackLoss::KL) {
        most_natural = load_largest(a.natural.row<C>(i), (*room)[1], n);
        usable &= is_finite(most_natural);
      }
      if (!usable) {
        value = kNaN<C>;
        fill(grad, n, C(0));
        continue;
      }
      const C z_y = z[y];
      if (is_sparse(a.loss))
        value = sparse(a, z, {z_y, y}, {z[t], t}, grad);
      else if (a.loss == AttackLoss::KL)
        value = divergence(a, *room, most, most_natural, grad);
      else
        value = from_others(a, z, z_y, t, most, grad);
      if (!in_play(z_y)) fill(grad, n, C(0));
    }
  }

  PYADV_HD static C from_others(const AttackArgs& a, C* z, C z_y, int64_t t, C most, C* grad) {
    const C z_t = z[t];
    z[t] = -kInf<C>;
    const C base = finite_base(z_t < most ? most : largest(z, a.classes));
    const C sum = exp_below(z, a.classes, base);
    const OthersLoss<C> loss(a.loss, a.unit, z_y, z_t, base, sum);
    store_multiple(z, grad, a.classes, loss.multiple);
    grad[t] = loss.at_t;
    return loss.value;
  }

  PYADV_HD static C sparse(const AttackArgs& a, const C* z, Candidate<C> y, Candidate<C> t,
                           C* grad) {
    const SparseLoss<C> loss(a.loss, a.unit, y, t, best<4>(z, a.classes));
    fill(grad, a.classes, C(0));
    for (int k = 0; k < SparseLoss<C>::kEntries; ++k) grad[loss.index[k]] = loss.entry[k];
    return loss.value;
  }

  // KL(q || p) and p - q. Where both are confident of one class, rounding loses their difference
  // there, so that entry is minus the sum of the others.
  PYADV_HD static C divergence(const AttackArgs& a, Buffers<C>& room, C most, C most_natural,
                               C* grad) {
    const int64_t n = a.classes;
    C *z = room[0], *u = room[1], *e_z = room[2], *e_u = room[3];
    const Softmax<C> adversarial = softmax_of(z, e_z, n, most);
    const Softmax<C> natural = softmax_of(u, e_u, n, most_natural);
    const int64_t top = first_with(u, n, most_natural, int64_t{-1});
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) {
      const KLTerm<C> term(natural, adversarial, u[k], z[k], e_u[k], e_z[k], false);
      z[k] = term.p - term.q;
      u[k] = term.q * term.log_ratio;
    }
    const C value = sum_of(u, n);
    if (!is_finite(value)) {
      fill(grad, n, C(0));
      return kInf<C>;
    }
    z[top] = C(0);
    z[top] = -sum_of(z, n);
    const C most_change =
        maximum(n, [z](int64_t k) PYADV_INLINE_LAMBDA { return C(std::fabs(z[k])); }, C(0));
    store_multiple(z, grad, n, a.unit && most_change > C(0) ? C(1) / most_change : C(1));
    return value;
  }
};

// "ce", "slm" and "ce_targeted" for few classes.
template <class C>
struct AttackTiles {
  PYADV_HD static void run(const AttackArgs* args, int64_t begin, int64_t end) {
    const AttackArgs& a = *args;
    constexpr int kRows = Tile<C>::kRows;
    const AttackLoss kind = a.loss;  // a load inside the loop would prevent its vectorisation
    const bool unit = a.unit;
    Tile<C> tile;
    typename Tile<C>::Index y[kRows], t[kRows];
    bool known_y[kRows], known_t[kRows], best[kRows], answered[kRows];
    C z_y[kRows], z_t[kRows], base[kRows], sum[kRows], value[kRows], multiple[kRows], at_t[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      tile.load(a.logits, a.classes, i, end);
      tile.load_labels(a.y, y, known_y);
      tile.load_labels(is_targeted(a.loss) ? a.target : a.y, t, known_t);
      tile.judge(y, z_y, best, answered);
      tile.take(t, z_t);
      tile.largest(base);
      for (int r = 0; r < kRows; ++r) base[r] = finite_base(base[r]);
      tile.exp_below(base, sum);
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        const OthersLoss<C> loss(kind, unit, z_y[r], z_t[r], base[r], sum[r]);
        value[r] = loss.value, multiple[r] = loss.multiple, at_t[r] = loss.at_t;
      }
      tile.store(static_cast<C*>(a.grad), t, multiple, at_t);
      for (int r = 0; r < tile.count; ++r) {
        a.correct[i + r] = known_y[r] && answered[r] && best[r];
        const bool usable = known_y[r] && known_t[r] && answered[r];
        static_cast<C*>(a.value)[i + r] = usable ? value[r] : kNaN<C>;
        if (!usable) fill(static_cast<C*>(a.grad) + (i + r) * a.classes, a.classes, C(0));
      }
    }
  }
};

template <class C>
PYADV_HD void write_value(const LossArgs& a, int64_t i, C value) {
  if (a.value != nullptr) static_cast<C*>(a.value)[i] = value;
}

// Writes one value and one gradient over a whole row, where a differentiable loss computes none.
template <class C>
PYADV_HD void write_row(const LossArgs& a, int64_t i, C value, C gradient) {
  write_value(a, i, value);
  if (a.grad != nullptr) fill(static_cast<C*>(a.grad) + i * a.classes, a.classes, gradient);
  if (a.grad_natural != nullptr)
    fill(static_cast<C*>(a.grad_natural) + i * a.classes, a.classes, gradient);
}

template <class C>
struct CrossEntropyLoop {
  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    for (int64_t i = begin; i < end; ++i)
      a.soft != nullptr ? soft(a, *room, i) : hard(a, (*room)[0], i);
  }

  PYADV_HD static void hard(const LossArgs& a, C* z, int64_t i) {
    const int64_t n = a.classes, y = a.y[i];
    if (a.ignores && y == a.ignored) return write_row(a, i, C(0), C(0));
    if (!is_class(y, n)) return write_row(a, i, kNaN<C>, C(0));
    const C most = load_largest(a.logits.row<C>(i), z, n);
    if (!is_finite(most)) return write_row(a, i, kNaN<C>, kNaN<C>);
    const C z_y = z[y], w = at(a.weight, i, C(1));
    z[y] = -kInf<C>;
    const C base = finite_base(z_y < most ? most : largest(z, n));
    const C sum = exp_below(z, n, base);
    const OthersLoss<C> loss(AttackLoss::CE, false, z_y, z_y, base, sum);
    write_value(a, i, w * loss.value);
    if (a.grad == nullptr) return;
    const C scale = w * at(a.cotangent, i, C(1));
    C* grad = static_cast<C*>(a.grad) + i * n;
    store_multiple(z, grad, n, scale * loss.multiple);
    grad[y] = scale * loss.at_t;
  }

  PYADV_HD static void soft(const LossArgs& a, Buffers<C>& room, int64_t i) {
    const int64_t n = a.classes;
    C *z = room[0], *e = room[1];
    const C* y = static_cast<const C*>(a.soft) + i * n;
    const C most = load_largest(a.logits.row<C>(i), z, n);
    if (!is_finite(most)) return write_row(a, i, kNaN<C>, kNaN<C>);
    const Softmax<C> softmax = softmax_of(z, e, n, most);
    const C w = at(a.weight, i, C(1));
    // A target of 0 adds nothing, also where its class is out of play.
    const C total = static_cast<C>(sum<C>(n, [&](int64_t k) PYADV_INLINE_LAMBDA {
      const C term = y[k] * softmax.log_p(z[k]);
      return y[k] == C(0) ? C(0) : term;
    }));
    if (std::fabs(total) == kInf<C>) return write_row(a, i, w * kInf<C>, C(0));
    write_value(a, i, -w * total);
    if (a.grad == nullptr) return;
    const C scale = w * at(a.cotangent, i, C(1)), of_p = sum_of(y, n) * softmax.inverse_sum;
    C* grad = static_cast<C*>(a.grad) + i * n;
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) grad[k] = scale * (of_p * e[k] - y[k]);
  }
};

// Cross-entropy with hard labels, for few classes.
template <class C>
struct CrossEntropyTiles {
  PYADV_HD static void run(const LossArgs* args, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    constexpr int kRows = Tile<C>::kRows;
    Tile<C> tile;
    typename Tile<C>::Index y[kRows];
    bool known[kRows], answered[kRows];
    C z_y[kRows], base[kRows], sum[kRows], value[kRows], multiple[kRows], at_y[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      tile.load(a.logits, a.classes, i, end);
      tile.load_labels(a.y, y, known);
      tile.take(y, z_y);
      tile.largest(base);
      for (int r = 0; r < kRows; ++r) {
        answered[r] = is_finite(nan_max(z_y[r], base[r]));
        base[r] = finite_base(base[r]);
      }
      tile.exp_below(base, sum);
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        const OthersLoss<C> loss(AttackLoss::CE, false, z_y[r], z_y[r], base[r], sum[r]);
        value[r] = loss.value, multiple[r] = loss.multiple, at_y[r] = loss.at_t;
      }
      for (int r = 0; r < tile.count; ++r) {
        const C w = at(a.weight, i + r, C(1)), scale = w * at(a.cotangent, i + r, C(1));
        value[r] *= w, multiple[r] *= scale, at_y[r] *= scale;
        write_value(a, i + r, value[r]);
      }
      if (a.grad != nullptr) tile.store(static_cast<C*>(a.grad), y, multiple, at_y);
      for (int r = 0; r < tile.count; ++r) {
        if (a.ignores && a.y[i + r] == a.ignored)
          write_row(a, i + r, C(0), C(0));
        else if (!known[r])
          write_row(a, i + r, kNaN<C>, C(0));
        else if (!answered[r])
          write_row(a, i + r, kNaN<C>, kNaN<C>);
      }
    }
  }
};

template <class C>
struct MartBCELoop {
  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.y[i];
      if (!is_class(y, n)) {
        write_row(a, i, kNaN<C>, C(0));
        continue;
      }
      const C most = load_largest(a.logits.row<C>(i), z, n);
      if (!is_finite(most)) {
        write_row(a, i, kNaN<C>, kNaN<C>);
        continue;
      }
      const C z_y = z[y];
      if (!in_play(z_y)) {
        write_row(a, i, kInf<C>, C(0));
        continue;
      }
      z[y] = -kInf<C>;
      const C z_m = z_y < most ? most : largest(z, n);
      const int64_t m = first_with(z, n, z_m, y);
      z[m] = -kInf<C>;
      const C base = nan_max(z_y, largest(z, n));
      const MartBCE<C> loss(a.exact, z_y, z_m, base, exp_below(z, n, base));
      write_value(a, i, loss.value);
      if (a.grad == nullptr) continue;
      const C scale = at(a.cotangent, i, C(1));
      C* grad = static_cast<C*>(a.grad) + i * n;
      store_multiple(z, grad, n, scale * loss.others);
      grad[y] = scale * loss.at_y;
      grad[m] = scale * loss.at_m;
    }
  }
};

// trades_kl and mart_kl.
template <class C>
struct KLLoop {
  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    const int64_t n = a.classes;
    const bool tiny = a.y != nullptr && !a.exact;
    C *z = (*room)[0], *u = (*room)[1], *e_z = (*room)[2], *e_u = (*room)[3];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.y != nullptr ? a.y[i] : 0;
      if (!is_class(y, n)) {
        write_row(a, i, kNaN<C>, C(0));
        continue;
      }
      const C most = load_largest(a.logits.row<C>(i), z, n);
      const C most_natural = load_largest(a.natural.row<C>(i), u, n);
      if (!is_finite(most) || !is_finite(most_natural)) {
        write_row(a, i, kNaN<C>, kNaN<C>);
        continue;
      }
      const Softmax<C> adversarial = softmax_of(z, e_z, n, most);
      const Softmax<C> natural = softmax_of(u, e_u, n, most_natural);
      double total[2];
      tiny ? sums<true>(n, natural, adversarial, z, u, e_z, e_u, total)
           : sums<false>(n, natural, adversarial, z, u, e_z, e_u, total);
      if (!is_finite(static_cast<C>(total[0]))) {
        write_row(a, i, kInf<C>, C(0));
        continue;
      }
      const C e_y = e_u[y];
      e_u[y] = C(0);
      const C others = a.exact ? sum_of(e_u, n) * natural.inverse_sum : C(0);
      e_u[y] = e_y;
      const KLRow<C> row(a, static_cast<C>(total[0]), static_cast<C>(total[1]),
                         e_y * natural.inverse_sum, others, at(a.cotangent, i, C(1)));
      write_value(a, i, row.value);
      if (a.grad == nullptr) continue;
      C* to_z = static_cast<C*>(a.grad) + i * n;
      C* to_u = static_cast<C*>(a.grad_natural) + i * n;
      tiny ? gradients<true>(n, row, natural, adversarial, z, u, e_z, e_u, to_z, to_u)
           : gradients<false>(n, row, natural, adversarial, z, u, e_z, e_u, to_z, to_u);
      to_u[y] = row.natural_gradient(
          KLTerm<C>(natural, adversarial, u[y], z[y], e_u[y], e_z[y], tiny), true);
    }
  }

  template <bool kTiny>
  PYADV_HD static void sums(int64_t n, const Softmax<C>& natural, const Softmax<C>& adversarial,
                            const C* z, const C* u, const C* e_z, const C* e_u,
                            double (&total)[2]) {
    cpu::sums<2, C>(
        n,
        [&](int64_t k, C(&t)[2]) PYADV_INLINE_LAMBDA {
          const KLTerm<C> term(natural, adversarial, u[k], z[k], e_u[k], e_z[k], kTiny);
          t[0] = term.q * term.log_ratio;
          t[1] = term.q * term.kept;
        },
        total);
    if (!kTiny) total[1] = 1.0;
  }

  template <bool kTiny>
  PYADV_HD static void gradients(int64_t n, const KLRow<C>& row, const Softmax<C>& natural,
                                 const Softmax<C>& adversarial, const C* z, const C* u,
                                 const C* e_z, const C* e_u, C* to_z, C* to_u) {
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) {
      const KLTerm<C> term(natural, adversarial, u[k], z[k], e_u[k], e_z[k], kTiny);
      to_z[k] = row.adversarial_gradient(term);
      to_u[k] = row.natural_gradient(term, false);
    }
  }
};

template <class C>
struct SoftmaxLoop {
  PYADV_HD static void run(const SoftmaxArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const SoftmaxArgs& a = *args;
    C* v = (*room)[0];
    const int64_t n = a.classes;
    const C inverse = C(1) / static_cast<C>(a.temperature);
    for (int64_t i = begin; i < end; ++i) {
      const C* row = a.logits.row<C>(i);
      const C base = load_largest(row, v, n);
      PYADV_INDEPENDENT
      for (int64_t k = 0; k < n; ++k) v[k] = (v[k] - base) * inverse;
      const C multiple = C(1) / exp_below(v, n, C(0));
      C* out = static_cast<C*>(a.out) + i * n;
      if (!a.center) {
        store_multiple(v, out, n, multiple);
        continue;
      }
      // Classes out of play keep the value 0, and the mean is over the others.
      const auto counts = [row](int64_t k) PYADV_INLINE_LAMBDA { return C(row[k] != -kInf<C>); };
      const C mean = C(1) / static_cast<C>(sum<C>(n, counts));
      PYADV_INDEPENDENT
      for (int64_t k = 0; k < n; ++k) {
        const C centred = v[k] * multiple - mean;
        out[k] = row[k] == -kInf<C> ? C(0) : centred;
      }
    }
  }
};

template <class C>
struct RowStatsLoop {
  PYADV_HD static void run(const RowStatsArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const RowStatsArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      RowStats<C> stats(a, i);
      if (!is_finite(load_largest(a.logits.row<C>(i), z, n))) {
        stats.write_unknown();
        continue;
      }
      const Top<C, 4> top = best<4>(z, n);
      stats.write_top(top);
      const int64_t y = a.y[i];
      if (!is_class(y, n)) {
        stats.write_no_margin();
        continue;
      }
      const C z_y = z[y];
      const C sum = exp_below(z, n, top.at[0].value);
      stats.write_margin(z_y, top.other_than(y), sum);
    }
  }
};

template <class T>
struct SquareSumLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const SquareArgs* args, int64_t begin, int64_t end) {
    const SquareArgs& a = *args;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = static_cast<const T*>(a.data) + i * a.n;
      if (a.cotangent == nullptr) {
        static_cast<C*>(a.out)[i] =
            static_cast<C>(sum<C>(a.n, [row](int64_t k) PYADV_INLINE_LAMBDA {
              const C v = widen(row[k]);
              return v * v;
            }));
        continue;
      }
      const C twice = C(2) * static_cast<const C*>(a.cotangent)[i];
      T* out = static_cast<T*>(a.out) + i * a.n;
      PYADV_INDEPENDENT
      for (int64_t k = 0; k < a.n; ++k) out[k] = narrow<T>(twice * widen(row[k]));
    }
  }
};

// Copies of rows of 16-bit floats in float, a few rows at a time, so that they stay in the cache.
// The loops are long, and one for each type would take long to compile.
template <class T>
class FloatRows {
 public:
  FloatRows(int64_t classes, int64_t rows)
      : n_(classes),
        most_(std::min(rows, std::max<int64_t>(1, kCopied / classes))),
        room_(new float[static_cast<size_t>(kCopies * most_ * n_)]) {}

  int64_t most() const { return most_; }

  void move(int64_t first, int64_t count) {
    first_ = first, count_ = count, used_ = 0, outputs_ = 0;
  }

  Logits in(const Logits& from) {
    if (from.data == nullptr) return from;
    float* to = copy();
    if (from.stride == n_)
      cpu::run<WidenLoop>(from.row<T>(first_), to, count_ * n_);
    else
      for (int64_t r = 0; r < count_; ++r)
        cpu::run<WidenLoop>(from.row<T>(first_ + r), to + r * n_, n_);
    return {to, n_};
  }

  // Room for a result of the type T, which `finish` rounds.
  void* out(void* to) {
    if (to == nullptr) return to;
    output_[outputs_] = {copy(), static_cast<T*>(to) + first_ * n_};
    return output_[outputs_++].from;
  }

  void finish() {
    for (int k = 0; k < outputs_; ++k)
      cpu::run<NarrowLoop>(static_cast<const float*>(output_[k].from), output_[k].to, count_ * n_);
  }

  // What belongs to the rows, `each` values per row.
  template <class V>
  V* at(V* values, int64_t each = 1) const {
    return values == nullptr ? values : values + first_ * each;
  }
  const void* floats(const void* values, int64_t each = 1) const {
    return at(static_cast<const float*>(values), each);
  }
  void* floats(void* values, int64_t each = 1) const {
    return at(static_cast<float*>(values), each);
  }

 private:
  static constexpr int kCopies = 4;
  static constexpr int64_t kCopied = 4096;  // elements

  float* copy() { return room_.get() + most_ * n_ * used_++; }

  int64_t n_, most_, first_ = 0, count_ = 0;
  int used_ = 0, outputs_ = 0;
  struct {
    float* from;
    T* to;
  } output_[2];
  std::unique_ptr<float[]> room_;
};

template <class Rows>
AttackArgs of_rows(AttackArgs a, Rows& rows) {
  a.logits = rows.in(a.logits);
  a.natural = rows.in(a.natural);
  a.y = rows.at(a.y);
  a.target = rows.at(a.target);
  a.value = rows.floats(a.value);
  a.grad = rows.out(a.grad);
  a.correct = rows.at(a.correct);
  return a;
}

template <class Rows>
LossArgs of_rows(LossArgs a, Rows& rows) {
  a.logits = rows.in(a.logits);
  a.natural = rows.in(a.natural);
  a.y = rows.at(a.y);
  a.soft = rows.floats(a.soft, a.classes);
  a.weight = rows.floats(a.weight);
  a.cotangent = rows.floats(a.cotangent);
  a.value = rows.floats(a.value);
  a.grad = rows.out(a.grad);
  a.grad_natural = rows.out(a.grad_natural);
  return a;
}

template <class Rows>
SoftmaxArgs of_rows(SoftmaxArgs a, Rows& rows) {
  a.logits = rows.in(a.logits);
  a.out = rows.out(a.out);
  return a;
}

template <class Rows>
RowStatsArgs of_rows(RowStatsArgs a, Rows& rows) {
  a.logits = rows.in(a.logits);
  a.y = rows.at(a.y);
  a.runner_up = rows.at(a.runner_up);
  a.margin = rows.floats(a.margin);
  a.prob_margin = rows.floats(a.prob_margin);
  a.top = rows.floats(a.top, 4);
  a.top_index = rows.at(a.top_index, 4);
  return a;
}

// Calls body(Tag<C>, args, begin, end) in the arithmetic type C, once or once per group of copies.
template <class Args, class Body>
void in_arithmetic_type(const Args& args, int64_t begin, int64_t end, const Body& body) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same<T, compute_t<T>>::value) {
      body(tag, args, begin, end);
    } else {
      FloatRows<T> rows(args.classes, end - begin);
      for (int64_t first = begin; first < end; first += rows.most()) {
        const int64_t count = std::min(rows.most(), end - first);
        rows.move(first, count);
        body(Tag<float>{}, of_rows(args, rows), int64_t{0}, count);
        rows.finish();
      }
    }
  });
}

// Runs Loop on the rows [begin, end) with `count` buffers of one row each.
template <template <class> class Loop, class Args>
void run_rows(const Args& args, int64_t count, int64_t begin, int64_t end) {
  in_arithmetic_type(args, begin, end, [count](auto tag, const Args& a, int64_t b, int64_t e) {
    using C = typename decltype(tag)::type;
    Buffers<C> room(a.classes, count);
    run_wide<Loop<C>>(&a, &room, b, e);
  });
}

template <template <class> class Tiles, class Args>
void run_tiles(const Args& args, int64_t begin, int64_t end) {
  in_arithmetic_type(args, begin, end, [](auto tag, const Args& a, int64_t b, int64_t e) {
    run_wide<Tiles<typename decltype(tag)::type>>(&a, b, e);
  });
}

}  // namespace

void attack_loss(const AttackArgs& args, int64_t begin, int64_t end) {
  if (takes_others(args.loss) && is_few(args.classes))
    return run_tiles<AttackTiles>(args, begin, end);
  run_rows<AttackLoop>(args, args.loss == AttackLoss::KL ? 4 : 1, begin, end);
}

void weighted_cross_entropy(const LossArgs& args, int64_t begin, int64_t end) {
  if (args.soft == nullptr && is_few(args.classes))
    return run_tiles<CrossEntropyTiles>(args, begin, end);
  run_rows<CrossEntropyLoop>(args, args.soft != nullptr ? 2 : 1, begin, end);
}

void kl(const LossArgs& args, int64_t begin, int64_t end) { run_rows<KLLoop>(args, 4, begin, end); }

void mart_bce(const LossArgs& args, int64_t begin, int64_t end) {
  run_rows<MartBCELoop>(args, 1, begin, end);
}

void softmax_cotangent(const SoftmaxArgs& args, int64_t begin, int64_t end) {
  run_rows<SoftmaxLoop>(args, 1, begin, end);
}

void row_stats(const RowStatsArgs& args, int64_t begin, int64_t end) {
  run_rows<RowStatsLoop>(args, 1, begin, end);
}

void row_square_sum(const SquareArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype,
           [&](auto tag) { run<SquareSumLoop<typename decltype(tag)::type>>(&args, begin, end); });
}

}  // namespace cpu
}  // namespace pyadv
