// Splits a flat range into spans of one row in which every parameter is constant.
#pragma once

#include <algorithm>

#include "common/types.h"

namespace pyadv {
namespace cpu {

// Calls f(first, last) for each span of [begin, end). Spans start at multiples of `length`.
template <class F>
void for_spans(int64_t begin, int64_t end, int64_t length, F&& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t last = std::min(end, (i / length + 1) * length);
    f(i, last);
    i = last;
  }
}

}  // namespace cpu
}  // namespace pyadv
