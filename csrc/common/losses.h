// Losses of rows of logits: one value per row, and its gradient with respect to the logits.
// Specification: pyadv/reference/losses.py.
//
// No formula computes 1 - p_t by subtraction. With gap = logsumexp_{j != t} z_j - z_t,
// p_t = sigmoid(-gap), 1 - p_t = sigmoid(gap), and cross-entropy is softplus(gap). All three keep
// their relative precision on confident rows.
//
// A logit of -inf takes its class out of play. A row has an answer if its largest logit is finite:
// then no logit is NaN or +inf, and a class is in play.
#pragma once

#include <cmath>
#include <limits>

#include "common/exp.h"
#include "common/math.h"
#include "common/types.h"

namespace pyadv {

// The order is that of ATTACK_LOSSES in pyadv/reference/losses.py.
enum class AttackLoss : int { CE, Margin, DLR, KL, SLM, CETargeted, MarginTargeted, DLRTargeted };

// A matrix [rows, classes]. The classes of a row are adjacent; rows are `stride` elements apart.
struct Logits {
  const void* data;
  int64_t stride;

  template <class T>
  PYADV_HD const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
};

struct AttackArgs {
  DType dtype;
  AttackLoss loss;
  bool unit;  // scale = "unit"
  Logits logits;
  Logits natural;         // for KL
  const int64_t* y;       // [rows]
  const int64_t* target;  // [rows], for the targeted losses
  void* value;            // [rows] of the compute type
  void* grad;             // [rows, classes]
  bool* correct;          // [rows]
  int64_t rows, classes;
};

// The differentiable losses. A kernel writes the values, the gradients, or both in one pass.
struct LossArgs {
  DType dtype;
  Logits logits;       // adversarial, where there are two
  Logits natural;      // trades_kl, mart_kl
  const int64_t* y;    // [rows]; nullptr for trades_kl and soft labels
  const void* soft;    // [rows, classes] of the compute type, or nullptr
  const void* weight;  // [rows] of the compute type, or nullptr: all ones
  bool ignores;        // rows with y == ignored have loss 0
  int64_t ignored;
  bool exact;             // MART: the paper's formulas, without the official code's constants
  bool detached;          // mart_kl: no gradient through the weight
  const void* cotangent;  // [rows] of the compute type, or nullptr: all ones
  void* value;            // [rows] of the compute type, or nullptr
  void* grad;             // [rows, classes], or nullptr
  void* grad_natural;     // [rows, classes], or nullptr
  int64_t rows, classes;
};

struct SoftmaxArgs {
  DType dtype;
  Logits logits;
  double temperature;
  bool center;
  void* out;  // [rows, classes]
  int64_t rows, classes;
};

struct RowStatsArgs {
  DType dtype;
  Logits logits;
  const int64_t* y;
  int64_t* runner_up;  // [rows]
  void* margin;        // [rows] of the compute type, like the next two
  void* prob_margin;   // [rows]
  void* top;           // [rows, 4]
  int64_t* top_index;  // [rows, 4]
  int64_t rows, classes;
};

struct SquareArgs {
  DType dtype;
  const void* data;       // [rows, n]
  const void* cotangent;  // [rows] of the compute type; nullptr for the forward pass
  void* out;              // [rows] of the compute type, or the gradient [rows, n]
  int64_t rows, n;
};

PYADV_HD bool is_class(int64_t y, int64_t classes) { return y >= 0 && y < classes; }

PYADV_HD bool is_targeted(AttackLoss loss) { return loss >= AttackLoss::CETargeted; }

// Losses that compare single logits. The others use a softmax.
PYADV_HD bool is_sparse(AttackLoss loss) {
  return loss == AttackLoss::Margin || loss == AttackLoss::DLR ||
         loss == AttackLoss::MarginTargeted || loss == AttackLoss::DLRTargeted;
}

// Losses computed from the softmax over all classes but one.
PYADV_HD bool takes_others(AttackLoss loss) { return !is_sparse(loss) && loss != AttackLoss::KL; }

template <class C>
PYADV_HD bool is_finite(C v) {
  return v - v == C(0);
}

// Variables, because device code cannot call the functions of numeric_limits.
template <class C>
constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
template <class C>
constexpr C kInf = std::numeric_limits<C>::infinity();
template <class C>
constexpr C kLowest = std::numeric_limits<C>::lowest();
constexpr int64_t kNoIndex = std::numeric_limits<int64_t>::max();

// Whether a class with this logit is in play. False for NaN.
template <class C>
PYADV_HD bool in_play(C z) {
  return z > -kInf<C>;
}

// A base to subtract before exp: the maximum, or a finite number where no class is in play.
template <class C>
PYADV_HD C finite_base(C maximum) {
  return maximum < kLowest<C> ? kLowest<C> : maximum;
}

// The logarithm of a sum of exponentials, which is 0 where no class is in play, else a normal
// number or NaN.
template <class C>
PYADV_HD C log_of_sum(C sum) {
  return sum == C(0) ? -kInf<C> : log_normal(sum);
}

// The logistic function at v and its relatives, computed from one exponential.
template <class C>
struct Logistic {
  C v, e;

  PYADV_HD explicit Logistic(C v) : v(v), e(exp_nonpositive(-std::fabs(v))) {}
  PYADV_HD C sigmoid() const { return (v < C(0) ? e : C(1)) / (C(1) + e); }
  PYADV_HD C complement() const { return (v < C(0) ? C(1) : e) / (C(1) + e); }  // 1 - sigmoid
  PYADV_HD C softplus() const {                                                 // log(1 + exp(v))
    const C one = C(1) + e, rounded = one - C(1);
    // The factor corrects the rounding error of the sum 1 + e (Kahan).
    const C log1p = rounded > C(0) ? log_normal(one) * (e / rounded) : e;
    return (v > C(0) ? v : C(0)) + log1p;
  }
};

template <class C>
struct Candidate {
  C value;
  int64_t index;
};

// The larger value; the smaller index where they tie.
template <class C>
PYADV_HD bool beats(const Candidate<C>& a, const Candidate<C>& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

// The K best classes, best first. Loops have constant bounds, so that a GPU keeps them in
// registers.
template <class C, int K>
struct Top {
  Candidate<C> at[K];

  PYADV_HD void clear() {
    for (int k = 0; k < K; ++k) at[k] = {-kInf<C>, kNoIndex};
  }
  PYADV_HD void insert(Candidate<C> c) {
    if (!beats(c, at[K - 1])) return;
    for (int k = 0; k < K; ++k) {
      if (beats(c, at[k])) {
        const Candidate<C> worse = at[k];
        at[k] = c;
        c = worse;
      }
    }
  }
  // The best class other than y.
  PYADV_HD Candidate<C> other_than(int64_t y) const { return at[0].index == y ? at[1] : at[0]; }
};

// Loss and gradient of "ce", "slm" and "ce_targeted". The gradient is at_t at class t and
// multiple * exp(z_k - base) elsewhere; it is 0 where the label, class t or all other classes are
// out of play.
template <class C>
struct OthersLoss {
  C value, multiple, at_t;

  // `sum` is the sum of exp(z_k - base) over k != t.
  PYADV_HD OthersLoss(AttackLoss loss, bool unit, C z_y, C z_t, C base, C sum) {
    const C gap = (base - z_t) + log_of_sum(sum);
    const Logistic<C> at_gap(gap);
    const C sign = loss == AttackLoss::CETargeted ? C(-1) : C(1), ce = sign * at_gap.softplus();
    // The gradient is the softmax of the others times 1 - p_t, or times 1.
    const bool whole = unit || loss == AttackLoss::SLM;
    // Choosing between numbers instead of expressions keeps branches out of vectorised loops.
    const C numerator = whole || gap >= C(0) ? C(1) : at_gap.e, e = whole ? C(0) : at_gap.e;
    const C mass = sign * (numerator / (C(1) + e));
    const bool moves = in_play(z_y) & in_play(z_t) & (sum > C(0));
    value = loss == AttackLoss::SLM ? gap : ce;
    multiple = moves ? mass / sum : C(0);
    at_t = moves ? -mass : C(0);
  }
};

// Loss and gradient of the losses that compare single logits. The gradient is zero except for these
// entries, several of which may name the same class. Where the label or its rival is out of play,
// the value is infinite and the gradient zero.
template <class C>
struct SparseLoss {
  static constexpr int kEntries = 5;
  C value;
  int64_t index[kEntries];
  C entry[kEntries];

  // t is the target class; untargeted losses ignore it.
  PYADV_HD SparseLoss(AttackLoss loss, bool unit, Candidate<C> y, Candidate<C> t,
                      const Top<C, 4>& top) {
    const Candidate<C> rival = is_targeted(loss) ? t : top.other_than(y.index);
    const bool moves = in_play(y.value) & in_play(rival.value);
    // DLR divides by z_1 - (share z_3 + (1 - share) z_4) of the sorted logits. With too few classes
    // in play for that, it is the margin.
    const C share = loss == AttackLoss::DLR ? C(1) : C(0.5);
    C below = top.at[2].value;
    if (loss == AttackLoss::DLRTargeted) below = (below + top.at[3].value) / C(2);
    const bool dlr = (loss == AttackLoss::DLR || loss == AttackLoss::DLRTargeted) && in_play(below);
    const C denominator = dlr ? (top.at[0].value - below) + C(1e-12) : C(1);
    value = in_play(y.value) ? (rival.value - y.value) / denominator : kInf<C>;
    // The gradient with respect to the denominator's classes.
    const C through = dlr && moves ? -value : C(0);
    index[0] = y.index, entry[0] = moves ? C(-1) : C(0);
    index[1] = rival.index, entry[1] = moves ? C(1) : C(0);
    index[2] = dlr ? top.at[0].index : y.index, entry[2] = through;
    index[3] = dlr ? top.at[2].index : y.index, entry[3] = -share * through;
    index[4] = dlr && loss == AttackLoss::DLRTargeted ? top.at[3].index : y.index;
    entry[4] = -(C(1) - share) * through;
    merge();
    C divisor = denominator;
    if (unit) {
      divisor = C(0);
      for (int i = 0; i < kEntries; ++i) divisor = nan_max(divisor, C(std::fabs(entry[i])));
      if (divisor == C(0)) divisor = C(1);
    }
    for (int i = 0; i < kEntries; ++i) entry[i] /= divisor;
  }

 private:
  // Replaces every entry by the sum over its class, so that the entries can be stored in any order.
  PYADV_HD void merge() {
    C total[kEntries];
    for (int i = 0; i < kEntries; ++i) {
      total[i] = C(0);
      for (int j = 0; j < kEntries; ++j)
        if (index[j] == index[i]) total[i] += entry[j];
    }
    for (int i = 0; i < kEntries; ++i) entry[i] = total[i];
  }
};

// The softmax of a row, from its maximum and its sum of exp(z - maximum).
template <class C>
struct Softmax {
  C base, log_sum, inverse_sum;

  PYADV_HD Softmax(C maximum, C sum)
      : base(maximum), log_sum(log_of_sum(sum)), inverse_sum(C(1) / sum) {}
  PYADV_HD C e(C z) const { return exp_nonpositive(z - base); }
  PYADV_HD C log_p(C z) const { return (z - base) - log_sum; }
};

// Constants that the official MART code adds so that no logarithm is infinite.
template <class C>
struct MartConstants {
  static constexpr C kOne = C(1.0001), kTiny = C(1e-12), kWeightOne = C(1.0000001);
};

// -log p_y - log(1 - p_m), where m is the best class other than y. The label must be in play.
// `base` is the maximum over the classes other than m; `rest` is the sum of exp(z_k - base) over
// the classes that are neither m nor y.
template <class C>
struct MartBCE {
  C value;
  C others;  // the gradient at a class k other than y and m is others * exp(z_k - base)
  C at_y, at_m;

  PYADV_HD MartBCE(bool exact, C z_y, C z_m, C base, C rest) {
    const C e_y = exp_nonpositive(z_y - base), sum = e_y + rest;
    const C log_sum = log_of_sum(sum);
    const Logistic<C> at_gap((z_m - base) - log_sum);
    const C p_m = at_gap.sigmoid(), not_m = at_gap.complement(), from_rest = at_gap.softplus();
    const C one_minus = exact ? not_m : (MartConstants<C>::kOne - p_m) + MartConstants<C>::kTiny;
    value = (base - z_y) + log_sum + from_rest + (exact ? from_rest : -std::log(one_minus));
    // The second logarithm raises m by p_m (1 - p_m) / one_minus and lowers the others in
    // proportion.
    const C pull = exact ? p_m : p_m * (not_m / one_minus);
    const C share = not_m - pull;  // multiplies the softmax over the classes other than m
    others = share / sum;
    at_y = -(p_m + not_m * (rest / sum)) - pull * (e_y / sum);
    at_m = p_m + pull;
  }
};

// The term of one class in KL(q || p).
template <class C>
struct KLTerm {
  C q, p, log_ratio;
  C kept;  // p / (p + tiny)

  // u and z are the natural and the adversarial logit, e_u and e_z their exponentials. With `tiny`,
  // MART's constant is added to p before the logarithm. A class that is in play for q and not for p
  // makes the term infinite or NaN.
  PYADV_HD KLTerm(const Softmax<C>& natural, const Softmax<C>& adversarial, C u, C z, C e_u, C e_z,
                  bool tiny) {
    q = e_u * natural.inverse_sum;
    p = e_z * adversarial.inverse_sum;
    const C padded = p + MartConstants<C>::kTiny;
    const C log_q = natural.log_p(u), log_p = tiny ? log_normal(padded) : adversarial.log_p(z);
    log_ratio = in_play(log_q) ? log_q - log_p : C(0);
    kept = tiny ? p / padded : C(1);
  }
};

// w KL(q || p) of a row and its gradients, for a finite divergence. w is 1 - q_y for mart_kl and 1
// for trades_kl.
template <class C>
struct KLRow {
  C value;
  C divergence, kept;  // sums of q log_ratio and of q kept
  C multiple;          // cotangent times w
  C through_weight;    // cotangent times the divergence times q_y; 0 if the weight is a constant

  // `others` is the sum of q_k over k != y.
  PYADV_HD KLRow(const LossArgs& args, C divergence, C kept, C q_y, C others, C cotangent)
      : divergence(divergence), kept(kept) {
    const bool weighted = args.y != nullptr;
    const C w = !weighted ? C(1) : args.exact ? others : MartConstants<C>::kWeightOne - q_y;
    value = w * divergence;
    multiple = cotangent * w;
    through_weight = weighted && !args.detached ? cotangent * divergence * q_y : C(0);
  }
  PYADV_HD C adversarial_gradient(const KLTerm<C>& t) const {
    return multiple * (t.p * kept - t.q * t.kept);
  }
  PYADV_HD C natural_gradient(const KLTerm<C>& t, bool is_y) const {
    const C one_hot = is_y ? through_weight : C(0);
    return t.q * (multiple * (t.log_ratio - divergence) + through_weight) - one_hot;
  }
};

// p_y - p_m without cancellation, from the margin z_y - z_m and the sum of exp(z - largest).
template <class C>
PYADV_HD C probability_margin(C margin, C sum) {
  const C size = -std::expm1(-std::fabs(margin)) / sum;
  return margin < C(0) ? -size : size;
}

// Writes the results of row_stats for one row. A value that does not exist is NaN, an index -1.
template <class C>
struct RowStats {
  const RowStatsArgs& args;
  int64_t row;

  PYADV_HD RowStats(const RowStatsArgs& args, int64_t row) : args(args), row(row) {}

  PYADV_HD void write_top(const Top<C, 4>& top) const {
    for (int k = 0; k < 4; ++k) write_top(k, top.at[k].value, top.at[k].index);
  }
  // y must be a class; `sum` is the sum of exp(z - largest).
  PYADV_HD void write_margin(C z_y, const Candidate<C>& other, C sum) const {
    const C margin = z_y - other.value;
    write_margin(other.index, margin, probability_margin(margin, sum));
  }
  PYADV_HD void write_no_margin() const { write_margin(-1, kNaN<C>, kNaN<C>); }
  PYADV_HD void write_unknown() const {
    for (int k = 0; k < 4; ++k) write_top(k, kNaN<C>, -1);
    write_no_margin();
  }

 private:
  PYADV_HD void write_top(int k, C value, int64_t index) const {
    static_cast<C*>(args.top)[4 * row + k] = value;
    args.top_index[4 * row + k] = in_play(value) ? index : -1;
  }
  PYADV_HD void write_margin(int64_t runner_up, C margin, C prob_margin) const {
    args.runner_up[row] = runner_up;
    static_cast<C*>(args.margin)[row] = margin;
    static_cast<C*>(args.prob_margin)[row] = prob_margin;
  }
};

}  // namespace pyadv
