#include "common/steps.h"

#include <algorithm>
#include <cstring>

#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace pyadv {
namespace cpu {

void linf_step(const StepArgs& s, int64_t begin, int64_t end) {
  run_elements<LinfStep>(s, begin, end);
}

void linf_momentum_step(const MomentumStepArgs& s, int64_t begin, int64_t end) {
  run_elements<LinfMomentumStep>(s, begin, end);
}

void l2_step(const StepArgs& s, int64_t begin, int64_t end) { run_rows<L2Step>(s, begin, end); }

void l2_momentum_step(const MomentumStepArgs& s, int64_t begin, int64_t end) {
  run_rows<L2MomentumStep>(s, begin, end);
}

void linf_boundary_step(const BoundaryStepArgs& s, int64_t begin, int64_t end) {
  run_rows<BoundaryStep<false>>(s, begin, end);
}

void l2_boundary_step(const BoundaryStepArgs& s, int64_t begin, int64_t end) {
  run_rows<BoundaryStep<true>>(s, begin, end);
}

void l1_step(const SparseStepArgs& s, int64_t begin, int64_t end) {
  run_rows<L1Step>(s, begin, end);
}

namespace {

void copy_row(const KeepRowsArgs& k, int64_t r) {
  for (int pair = 0; pair < 2 && k.to[pair] != nullptr; ++pair)
    std::memcpy(static_cast<char*>(k.to[pair]) + r * k.row_bytes,
                static_cast<const char*>(k.from[pair]) + r * k.row_bytes,
                static_cast<size_t>(k.row_bytes));
}

}  // namespace

void keep_rows(const KeepRowsArgs& k, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    if (k.mask[r]) copy_row(k, r);
}

void keep_best(const KeepBestArgs& k, int64_t begin, int64_t end) {
  dispatch(k.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = begin; r < end; ++r) {
      if (!k.better<T>(r)) continue;
      copy_row(k.pairs, r);
      k.keep<T>(r);
    }
  });
}

void square_step(const SquareStepArgs& s, int64_t begin, int64_t end) {
  const Window& w = s.window;
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = begin; r < end; ++r) {
      const bool active = s.active == nullptr || s.active[r];
      const T* from = static_cast<const T*>(active ? s.x_best : s.x_adv) + r * s.n;
      T* out = static_cast<T*>(s.out) + r * s.n;
      if (out != from) std::copy(from, from + s.n, out);
      if (!active) continue;
      const int64_t top = w.top(r), left = w.left(r);
      for (int64_t c = 0; c < w.channels; ++c)
        for (int64_t y = top; y < top + w.side; ++y)
          for (int64_t z = left; z < left + w.side; ++z) {
            const int64_t i = c * w.stride[0] + y * w.stride[1] + z * w.stride[2];
            out[i] = SquareStep::at<T>(s, r * s.n + i, w.up(r, c));
          }
    }
  });
}

}  // namespace cpu
}  // namespace pyadv
