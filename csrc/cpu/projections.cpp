#include "common/projections.h"

#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace pyadv {
namespace cpu {

void linf_project(const ProjectionArgs& s, int64_t begin, int64_t end) {
  run_elements<LinfProject>(s, begin, end);
}

void l2_project(const ProjectionArgs& s, int64_t begin, int64_t end) {
  run_rows<L2Project>(s, begin, end);
}

void l2_box_project(const ProjectionArgs& s, int64_t begin, int64_t end) {
  run_rows<L2BoxProject>(s, begin, end);
}

void l1_project(const ProjectionArgs& s, int64_t begin, int64_t end) {
  run_rows<L1Project>(s, begin, end);
}

}  // namespace cpu
}  // namespace pyadv
