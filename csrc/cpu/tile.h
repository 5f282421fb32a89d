// A tile holds kRows rows of few classes side by side, so that loops vectorise over the rows: with
// ten classes that is several times as fast as vectorising over the classes. Results equal those of
// the loops over single rows bit for bit, because sums of less than kLanes terms run in the same
// order there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/losses.h"
#include "cpu/reduce.h"

namespace pyadv {
namespace cpu {

inline bool is_few(int64_t classes) { return classes < kLanes; }

template <class C>
struct Tile {
  static constexpr int kRows = 32;
  using Index = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;  // as wide as C

  int n;               // classes
  int count;           // existing rows; copies of the last one fill the tile
  int64_t first;       // index of the first row
  C z[kLanes][kRows];  // logits, later exponentials

  PYADV_HD void load(const Logits& logits, int64_t classes, int64_t begin, int64_t end) {
    n = static_cast<int>(classes);
    first = begin;
    count = static_cast<int>(std::min<int64_t>(kRows, end - begin));
    for (int r = 0; r < kRows; ++r) {
      const C* row = logits.row<C>(row_of(r));
      for (int k = 0; k < n; ++k) z[k][r] = row[k];
    }
  }
  PYADV_HD int64_t row_of(int r) const { return first + std::min(r, count - 1); }

  // Sets index to 0 where a label is no class.
  PYADV_HD void load_labels(const int64_t* labels, Index (&index)[kRows],
                            bool (&known)[kRows]) const {
    for (int r = 0; r < kRows; ++r) {
      const int64_t label = labels[row_of(r)];
      known[r] = is_class(label, n);
      index[r] = known[r] ? static_cast<Index>(label) : 0;
    }
  }

  PYADV_HD void pick(const Index (&index)[kRows], C (&picked)[kRows]) const {
    for (int r = 0; r < kRows; ++r) picked[r] = z[index[r]][r];
  }

  // Picks the logit of class `index`; decides whether it is the first of the largest logits, and
  // whether the row has an answer.
  PYADV_HD void judge(const Index (&index)[kRows], C (&own)[kRows], bool (&best)[kRows],
                      bool (&answered)[kRows]) const {
    C most[kRows];
    Index beaten[kRows] = {};
    pick(index, own);
    for (int r = 0; r < kRows; ++r) most[r] = -kInf<C>;
    for (int k = 0; k < n; ++k) {
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        most[r] = nan_max(most[r], z[k][r]);
        beaten[r] |= (z[k][r] > own[r]) | ((z[k][r] == own[r]) & (index[r] > k));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      best[r] = !beaten[r];
      answered[r] = is_finite(most[r]);
    }
  }

  // Picks the logit of class `index` and sets it to -inf.
  PYADV_HD void take(const Index (&index)[kRows], C (&taken)[kRows]) {
    pick(index, taken);
    for (int r = 0; r < kRows; ++r) z[index[r]][r] = -kInf<C>;
  }

  // Finds the largest logit of each row; NaN if one is NaN.
  PYADV_HD void largest(C (&most)[kRows]) const {
    for (int r = 0; r < kRows; ++r) most[r] = -kInf<C>;
    for (int k = 0; k < n; ++k) {
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) most[r] = nan_max(most[r], z[k][r]);
    }
  }

  // Replaces z by exp(z - base) and sums each row.
  PYADV_HD void exp_below(const C (&base)[kRows], C (&sum)[kRows]) {
    double total[kRows] = {};
    for (int k = 0; k < n; ++k) {
      PYADV_INDEPENDENT
      for (int r = 0; r < kRows; ++r) {
        z[k][r] = exp_nonpositive(z[k][r] - base[r]);
        total[r] += z[k][r];
      }
    }
    for (int r = 0; r < kRows; ++r) sum[r] = static_cast<C>(total[r]);
  }

  // Writes z times multiple, and at_index to class `index`.
  PYADV_HD void store(C* out, const Index (&index)[kRows], const C (&multiple)[kRows],
                      const C (&at_index)[kRows]) const {
    for (int r = 0; r < count; ++r) {
      C* row = out + (first + r) * n;
      for (int k = 0; k < n; ++k) row[k] = z[k][r] * multiple[r];
      row[index[r]] = at_index[r];
    }
  }
};

}  // namespace cpu
}  // namespace pyadv
