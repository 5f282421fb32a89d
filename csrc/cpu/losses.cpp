#include "common/losses.h"

#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/reduce.h"
#include "cpu/tile.h"

namespace pyadv {
namespace cpu {
namespace {

// A row at a time is widened into a buffer, where the passes over it find it in the cache.
constexpr int64_t kWidest = 16;  // floats in a vector; buffers are padded so that exp needs no tail

template <class C>
class Buffers {
 public:
  Buffers(int64_t classes, int64_t count)
      : padded_((classes + kWidest - 1) / kWidest * kWidest), data_(padded_ * count) {}
  C* operator[](int64_t i) { return data_.data() + i * padded_; }

 private:
  int64_t padded_;
  std::vector<C> data_;
};

template <class T, class C>
PYADV_HD void load(const T* row, C* v, int64_t n) {
  PYADV_INDEPENDENT
  for (int64_t k = 0; k < n; ++k) v[k] = widen(row[k]);
}

template <class C>
PYADV_HD C largest(const C* v, int64_t n) {
  return maximum(n, [v](int64_t k) { return v[k]; }, -kInf<C>);
}

// Whether all of them are finite.
template <class T, class C>
PYADV_HD bool load_finite(const T* row, C* v, int64_t n) {
  return is_finite(maximum(n, [=](int64_t k) { return C(std::fabs(v[k] = widen(row[k]))); }, C(0)));
}

// The first class with this value, other than `skipped`; `skipped` itself if there is none.
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

// v becomes exp(v - base); `v` is padded.
template <class C>
PYADV_HD void exp_below(C* v, int64_t n, C base) {
  const int64_t padded = (n + kWidest - 1) / kWidest * kWidest;
  PYADV_INDEPENDENT
  for (int64_t k = 0; k < padded; ++k) v[k] = exp_nonpositive(v[k] - base);
}

template <class C>
PYADV_HD C sum_of(const C* v, int64_t n) {
  return static_cast<C>(sum<C>(n, [v](int64_t k) { return v[k]; }));
}

template <class T, class C>
PYADV_HD void store_multiple(const C* v, T* out, int64_t n, C multiple) {
  PYADV_INDEPENDENT
  for (int64_t k = 0; k < n; ++k) out[k] = narrow<T>(v[k] * multiple);
}

template <class T, class C>
PYADV_HD void fill(T* out, int64_t n, C value) {
  std::fill(out, out + n, narrow<T>(value));
}

// The softmax of v, its exponentials in e.
template <class C>
PYADV_HD Softmax<C> softmax_of(const C* v, C* e, int64_t n) {
  const C base = finite_base(largest(v, n));
  std::copy(v, v + n, e);
  exp_below(e, n, base);
  return Softmax<C>(base, sum_of(e, n));
}

template <class C>
PYADV_HD C at(const void* values, int64_t i, C absent) {
  return values == nullptr ? absent : static_cast<const C*>(values)[i];
}

template <class T>
struct AttackLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const AttackArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const AttackArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      T* grad = static_cast<T*>(a.grad) + i * n;
      C& value = static_cast<C*>(a.value)[i];
      const int64_t y = a.y[i], t = is_targeted(a.loss) ? a.target[i] : y;
      bool usable = load_finite(a.logits.row<T>(i), z, n) && is_class(y, n) && is_class(t, n);
      if (a.loss == AttackLoss::KL) usable &= load_finite(a.natural.row<T>(i), (*room)[1], n);
      if (!usable) {
        value = kNaN<C>;
        fill(grad, n, C(0));
        a.correct[i] = false;
        continue;
      }
      const C z_y = z[y];
      z[y] = -kInf<C>;
      const C others = largest(z, n);
      a.correct[i] = z_y > others || (z_y == others && y < first_with(z, n, others, y));
      if (is_sparse(a.loss)) {
        z[y] = z_y;
        value = sparse(a, z, {z_y, y}, {z[t], t}, grad);
      } else if (a.loss == AttackLoss::KL) {
        z[y] = z_y;
        value = divergence(a, *room, grad);
      } else {
        if (is_targeted(a.loss)) {
          z[y] = z_y;
          const C z_t = z[t];
          z[t] = -kInf<C>;
          value = from_others(a, z, {z_t, t}, largest(z, n), grad);
        } else {
          value = from_others(a, z, {z_y, y}, others, grad);
        }
      }
    }
  }

  PYADV_HD static C from_others(const AttackArgs& a, C* z, Candidate<C> t, C base, T* grad) {
    exp_below(z, a.classes, base);
    const OthersLoss<C> loss(a.loss, a.unit, t.value, base, sum_of(z, a.classes));
    store_multiple(z, grad, a.classes, loss.multiple);
    grad[t.index] = narrow<T>(loss.at_t);
    return loss.value;
  }

  PYADV_HD static C sparse(const AttackArgs& a, const C* z, Candidate<C> y, Candidate<C> t,
                           T* grad) {
    const SparseLoss<C> loss(a.loss, a.unit, y, t, best<4>(z, a.classes));
    fill(grad, a.classes, C(0));
    for (int k = 0; k < SparseLoss<C>::kEntries; ++k)
      grad[loss.index[k]] = narrow<T>(loss.entry[k]);
    return loss.value;
  }

  // KL(q || p) and p - q. Where both are confident of one class their difference there is lost in
  // rounding, so that entry is minus the sum of the others.
  PYADV_HD static C divergence(const AttackArgs& a, Buffers<C>& room, T* grad) {
    const int64_t n = a.classes;
    C *z = room[0], *u = room[1], *e_z = room[2], *e_u = room[3];
    const Softmax<C> adversarial = softmax_of(z, e_z, n), natural = softmax_of(u, e_u, n);
    const int64_t top = first_with(u, n, natural.base, int64_t{-1});
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) {
      const KLTerm<C> term(natural, adversarial, u[k], z[k], e_u[k], e_z[k], false);
      z[k] = term.p - term.q;
      u[k] = term.q * term.log_ratio;
    }
    z[top] = C(0);
    z[top] = -sum_of(z, n);
    const C most = maximum(n, [z](int64_t k) { return C(std::fabs(z[k])); }, C(0));
    store_multiple(z, grad, n, a.unit && most > C(0) ? C(1) / most : C(1));
    return sum_of(u, n);
  }
};

// "ce", "slm" and "ce_targeted" of few classes.
template <class T>
struct AttackTiles {
  using C = compute_t<T>;

  PYADV_HD static void run(const AttackArgs* args, int64_t begin, int64_t end) {
    const AttackArgs& a = *args;
    constexpr int kRows = Tile<C>::kRows;
    const AttackLoss kind = a.loss;  // outside the loop, which is not vectorised otherwise
    const bool unit = a.unit;
    Tile<C> tile;
    typename Tile<C>::Index y[kRows], t[kRows];
    bool known_y[kRows], known_t[kRows], best[kRows], finite[kRows];
    C z_t[kRows], base[kRows], sum[kRows], value[kRows], multiple[kRows], at_t[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      tile.template load<T>(a.logits, a.classes, i, end);
      tile.load_labels(a.y, y, known_y);
      tile.load_labels(is_targeted(a.loss) ? a.target : a.y, t, known_t);
      tile.judge(y, best, finite);
      tile.take(t, z_t);
      tile.largest(base);
      tile.exp_below(base, sum);
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        const OthersLoss<C> loss(kind, unit, z_t[r], base[r], sum[r]);
        value[r] = loss.value, multiple[r] = loss.multiple, at_t[r] = loss.at_t;
      }
      tile.store(static_cast<T*>(a.grad), t, multiple, at_t);
      for (int r = 0; r < tile.count; ++r) {
        const bool usable = known_y[r] && known_t[r] && finite[r];
        static_cast<C*>(a.value)[i + r] = usable ? value[r] : kNaN<C>;
        a.correct[i + r] = usable && best[r];
        if (!usable) fill(static_cast<T*>(a.grad) + (i + r) * a.classes, a.classes, C(0));
      }
    }
  }
};

template <class C>
PYADV_HD void write_value(const LossArgs& a, int64_t i, C value) {
  if (a.value != nullptr) static_cast<C*>(a.value)[i] = value;
}

// What the differentiable losses write for a row that is not computed: an ignored one, or one whose
// label is no class.
template <class T, class C>
PYADV_HD void write_row(const LossArgs& a, int64_t i, C value, C gradient) {
  write_value(a, i, value);
  if (a.grad != nullptr) fill(static_cast<T*>(a.grad) + i * a.classes, a.classes, gradient);
  if (a.grad_natural != nullptr)
    fill(static_cast<T*>(a.grad_natural) + i * a.classes, a.classes, gradient);
}

template <class T>
struct CrossEntropyLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    for (int64_t i = begin; i < end; ++i)
      a.soft != nullptr ? soft(a, *room, i) : hard(a, (*room)[0], i);
  }

  PYADV_HD static void hard(const LossArgs& a, C* z, int64_t i) {
    const int64_t n = a.classes, y = a.y[i];
    if (a.ignores && y == a.ignored) return write_row<T>(a, i, C(0), C(0));
    if (!is_class(y, n)) return write_row<T>(a, i, kNaN<C>, C(0));
    load(a.logits.row<T>(i), z, n);
    const C z_y = z[y];
    z[y] = -kInf<C>;
    const C others = largest(z, n);
    if (!is_usable(z_y, others)) return write_row<T>(a, i, kNaN<C>, kNaN<C>);
    const C base = finite_base(others), w = at(a.weight, i, C(1));
    exp_below(z, n, base);
    const OthersLoss<C> loss(AttackLoss::CE, false, z_y, base, sum_of(z, n));
    write_value(a, i, w * loss.value);
    if (a.grad == nullptr) return;
    const C scale = w * at(a.cotangent, i, C(1));
    T* grad = static_cast<T*>(a.grad) + i * n;
    store_multiple(z, grad, n, scale * loss.multiple);
    grad[y] = narrow<T>(scale * loss.at_t);
  }

  PYADV_HD static void soft(const LossArgs& a, Buffers<C>& room, int64_t i) {
    const int64_t n = a.classes;
    C *z = room[0], *e = room[1];
    const C* y = static_cast<const C*>(a.soft) + i * n;
    load(a.logits.row<T>(i), z, n);
    const Softmax<C> softmax = softmax_of(z, e, n);
    const C w = at(a.weight, i, C(1));
    if (a.value != nullptr) {
      const double total = sum<C>(n, [&](int64_t k) { return y[k] * softmax.log_p(z[k]); });
      write_value(a, i, -w * static_cast<C>(total));
    }
    if (a.grad == nullptr) return;
    const C scale = w * at(a.cotangent, i, C(1)), of_p = sum_of(y, n) * softmax.inverse_sum;
    T* grad = static_cast<T*>(a.grad) + i * n;
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) grad[k] = narrow<T>(scale * (of_p * e[k] - y[k]));
  }
};

// Hard labels, few classes.
template <class T>
struct CrossEntropyTiles {
  using C = compute_t<T>;

  PYADV_HD static void run(const LossArgs* args, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    constexpr int kRows = Tile<C>::kRows;
    Tile<C> tile;
    typename Tile<C>::Index y[kRows];
    bool known[kRows], usable[kRows];
    C z_y[kRows], base[kRows], sum[kRows], value[kRows], multiple[kRows], at_y[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      tile.template load<T>(a.logits, a.classes, i, end);
      tile.load_labels(a.y, y, known);
      tile.take(y, z_y);
      tile.largest(base);
      for (int r = 0; r < kRows; ++r) {
        usable[r] = is_usable(z_y[r], base[r]);
        base[r] = finite_base(base[r]);
      }
      tile.exp_below(base, sum);
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        const OthersLoss<C> loss(AttackLoss::CE, false, z_y[r], base[r], sum[r]);
        value[r] = loss.value, multiple[r] = loss.multiple, at_y[r] = loss.at_t;
      }
      for (int r = 0; r < tile.count; ++r) {
        const C w = at(a.weight, i + r, C(1)), scale = w * at(a.cotangent, i + r, C(1));
        value[r] *= w, multiple[r] *= scale, at_y[r] *= scale;
        write_value(a, i + r, value[r]);
      }
      if (a.grad != nullptr) tile.store(static_cast<T*>(a.grad), y, multiple, at_y);
      for (int r = 0; r < tile.count; ++r) {
        if (a.ignores && a.y[i + r] == a.ignored)
          write_row<T>(a, i + r, C(0), C(0));
        else if (!known[r])
          write_row<T>(a, i + r, kNaN<C>, C(0));
        else if (!usable[r])
          write_row<T>(a, i + r, kNaN<C>, kNaN<C>);
      }
    }
  }
};

template <class T>
struct MartBCELoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.y[i];
      load(a.logits.row<T>(i), z, n);
      if (!is_class(y, n)) {
        write_row<T>(a, i, kNaN<C>, C(0));
        continue;
      }
      const C z_y = z[y];
      z[y] = -kInf<C>;
      const C z_m = largest(z, n);
      if (!is_usable(z_y, z_m)) {
        write_row<T>(a, i, kNaN<C>, kNaN<C>);
        continue;
      }
      const int64_t m = first_with(z, n, z_m, y);
      z[m] = -kInf<C>;
      const C base = finite_base(nan_max(z_y, largest(z, n)));
      exp_below(z, n, base);
      const MartBCE<C> loss(a.exact, z_y, z_m, base, sum_of(z, n));
      write_value(a, i, loss.value);
      if (a.grad == nullptr) continue;
      const C scale = at(a.cotangent, i, C(1));
      T* grad = static_cast<T*>(a.grad) + i * n;
      store_multiple(z, grad, n, scale * loss.others);
      grad[y] = narrow<T>(scale * loss.at_y);
      grad[m] = narrow<T>(scale * loss.at_m);
    }
  }
};

// trades_kl and mart_kl.
template <class T>
struct KLLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const LossArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const LossArgs& a = *args;
    const int64_t n = a.classes;
    const bool tiny = a.y != nullptr && !a.exact;
    C *z = (*room)[0], *u = (*room)[1], *e_z = (*room)[2], *e_u = (*room)[3];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = a.y != nullptr ? a.y[i] : 0;
      if (!is_class(y, n)) {
        write_row<T>(a, i, kNaN<C>, C(0));
        continue;
      }
      load(a.logits.row<T>(i), z, n);
      load(a.natural.row<T>(i), u, n);
      const Softmax<C> adversarial = softmax_of(z, e_z, n), natural = softmax_of(u, e_u, n);
      double total[2];
      tiny ? sums<true>(n, natural, adversarial, z, u, e_z, e_u, total)
           : sums<false>(n, natural, adversarial, z, u, e_z, e_u, total);
      const C e_y = e_u[y];
      e_u[y] = C(0);
      const C others = a.exact ? sum_of(e_u, n) * natural.inverse_sum : C(0);
      e_u[y] = e_y;
      const KLRow<C> row(a, static_cast<C>(total[0]), static_cast<C>(total[1]),
                         e_y * natural.inverse_sum, others, at(a.cotangent, i, C(1)));
      write_value(a, i, row.value);
      if (a.grad == nullptr) continue;
      T* to_z = static_cast<T*>(a.grad) + i * n;
      T* to_u = static_cast<T*>(a.grad_natural) + i * n;
      tiny ? gradients<true>(n, row, natural, adversarial, z, u, e_z, e_u, to_z, to_u)
           : gradients<false>(n, row, natural, adversarial, z, u, e_z, e_u, to_z, to_u);
      to_u[y] = narrow<T>(row.natural_gradient(
          KLTerm<C>(natural, adversarial, u[y], z[y], e_u[y], e_z[y], tiny), true));
    }
  }

  template <bool kTiny>
  PYADV_HD static void sums(int64_t n, const Softmax<C>& natural, const Softmax<C>& adversarial,
                            const C* z, const C* u, const C* e_z, const C* e_u,
                            double (&total)[2]) {
    cpu::sums<2, C>(
        n,
        [&](int64_t k, C(&t)[2]) {
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
                                 const C* e_z, const C* e_u, T* to_z, T* to_u) {
    PYADV_INDEPENDENT
    for (int64_t k = 0; k < n; ++k) {
      const KLTerm<C> term(natural, adversarial, u[k], z[k], e_u[k], e_z[k], kTiny);
      to_z[k] = narrow<T>(row.adversarial_gradient(term));
      to_u[k] = narrow<T>(row.natural_gradient(term, false));
    }
  }
};

template <class T>
struct SoftmaxLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const SoftmaxArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const SoftmaxArgs& a = *args;
    C* v = (*room)[0];
    const int64_t n = a.classes;
    const C inverse = C(1) / static_cast<C>(a.temperature);
    const C mean = a.center ? C(1) / static_cast<C>(n) : C(0);
    for (int64_t i = begin; i < end; ++i) {
      load(a.logits.row<T>(i), v, n);
      const C base = largest(v, n);
      PYADV_INDEPENDENT
      for (int64_t k = 0; k < n; ++k) v[k] = (v[k] - base) * inverse;
      exp_below(v, n, C(0));
      const C multiple = C(1) / sum_of(v, n);
      T* out = static_cast<T*>(a.out) + i * n;
      PYADV_INDEPENDENT
      for (int64_t k = 0; k < n; ++k) out[k] = narrow<T>(v[k] * multiple - mean);
    }
  }
};

template <class T>
struct RowStatsLoop {
  using C = compute_t<T>;

  PYADV_HD static void run(const RowStatsArgs* args, Buffers<C>* room, int64_t begin, int64_t end) {
    const RowStatsArgs& a = *args;
    C* z = (*room)[0];
    const int64_t n = a.classes;
    for (int64_t i = begin; i < end; ++i) {
      RowStats<C> stats(a, i);
      if (!load_finite(a.logits.row<T>(i), z, n)) {
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
      exp_below(z, n, top.at[0].value);
      stats.write_margin(z_y, top.other_than(y), sum_of(z, n));
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
        static_cast<C*>(a.out)[i] = static_cast<C>(sum<C>(a.n, [row](int64_t k) {
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

// An AVX-512 clone for 32 and 64 bits alone: of four types, it takes long to compile.
template <class Loop, class T, class... Args>
void run_float(Args... args) {
  if constexpr (sizeof(T) >= 4)
    run_wide<Loop>(args...);
  else
    run<Loop>(args...);
}

// Runs Loop<T> on the rows [begin, end) with `count` buffers for the classes of a row.
template <template <class> class Loop, class Args>
void run_rows(const Args& args, int64_t count, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Buffers<compute_t<T>> room(args.classes, count);
    run_float<Loop<T>, T>(&args, &room, begin, end);
  });
}

template <template <class> class Tiles, class Args>
void run_tiles(const Args& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run_float<Tiles<T>, T>(&args, begin, end);
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
