#include "common/geometry.h"

#include "cpu/kernels.h"

namespace pyadv {
namespace cpu {

void track(const TrackArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) args(row);
}

}  // namespace cpu
}  // namespace pyadv
