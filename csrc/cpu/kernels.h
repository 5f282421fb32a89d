// CPU kernels: each works on the items [begin, end) of the flat or row range its caller splits.
#pragma once

#include "common/geometry.h"
#include "common/noise.h"
#include "common/steps.h"

namespace pyadv {
namespace cpu {

void linf_step(const StepArgs& args, int64_t begin, int64_t end);  // items: elements

void track(const TrackArgs& args, int64_t begin, int64_t end);  // items: rows

void keyed_uniform(const NoiseArgs& args, int64_t begin, int64_t end);  // items: Philox blocks
void keyed_normal(const NoiseArgs& args, int64_t begin, int64_t end);   // items: Philox blocks
void row_hash(const HashArgs& args, int64_t begin, int64_t end);        // items: rows

}  // namespace cpu
}  // namespace pyadv
