// Splits a flat range into spans in which every parameter and the row are constant.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/types.h"

namespace pyadv {
namespace cpu {

// The longest span with constant parameters, at most `whole`. The `inner` of parameters nest (pixels
// of a channel, elements of a row), so the smallest divides the others.
inline int64_t span_length(std::initializer_list<const Param*> params, int64_t whole) {
  int64_t length = whole;
  for (const Param* p : params)
    if (p->data != nullptr && p->period > 1) length = std::min(length, p->inner);
  return std::max<int64_t>(length, 1);
}

// Calls f(first, last) for the spans of [begin, end); spans start at multiples of `length`.
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
