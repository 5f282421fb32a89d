// 16-byte loads and stores, for pointers that are aligned to 16 bytes.
#pragma once

#include "common/types.h"

namespace pyadv {
namespace cuda {

// V elements that one access reads or writes: 16 bytes, or one element.
template <class T, int V>
struct alignas(V == 1 ? alignof(T) : 16) Vec {
  T v[V];
};

template <class... P>
bool aligned16(P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

}  // namespace cuda
}  // namespace pyadv
