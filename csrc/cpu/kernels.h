// CPU kernels: each works on the items [begin, end) of the flat or row range its caller splits.
#pragma once

#include "common/steps.h"

namespace pyadv {
namespace cpu {

void linf_step(const StepArgs& args, int64_t begin, int64_t end);  // items: elements

}  // namespace cpu
}  // namespace pyadv
