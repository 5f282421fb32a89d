#include "common/steps.h"

#include <cstring>

#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace pyadv {
namespace cpu {

void linf_step(const StepArgs& s, int64_t begin, int64_t end) {
  run_elements<LinfStep>(s, begin, end);
}

void linf_momentum_step(const StepArgs& s, int64_t begin, int64_t end) {
  run_elements<LinfMomentumStep>(s, begin, end);
}

void l2_step(const StepArgs& s, int64_t begin, int64_t end) { run_rows<L2Step>(s, begin, end); }

void l2_momentum_step(const StepArgs& s, int64_t begin, int64_t end) {
  run_rows<L2MomentumStep>(s, begin, end);
}

void l1_step(const StepArgs& s, int64_t begin, int64_t end) { run_rows<L1Step>(s, begin, end); }

void keep_rows(const KeepRowsArgs& k, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (!k.mask[r]) continue;
    for (int pair = 0; pair < 2; ++pair)
      std::memcpy(static_cast<char*>(k.to[pair]) + r * k.row_bytes,
                  static_cast<const char*>(k.from[pair]) + r * k.row_bytes,
                  static_cast<size_t>(k.row_bytes));
  }
}

}  // namespace cpu
}  // namespace pyadv
