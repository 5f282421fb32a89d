#include "common/projections.h"

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace pyadv {
namespace cuda {

int linf_project(const ProjectionArgs& s, void* stream) {
  return run_elements<LinfProject>(s, stream);
}

int l2_project(const ProjectionArgs& s, void* stream) { return run_rows<L2Project>(s, stream); }

int l2_box_project(const ProjectionArgs& s, void* stream) {
  return run_rows<L2BoxProject>(s, stream);
}

int l1_project(const ProjectionArgs& s, void* stream) { return run_rows<L1Project>(s, stream); }

}  // namespace cuda
}  // namespace pyadv
