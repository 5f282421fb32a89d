// Converts ranges of 16-bit floats to float and back. Loops with long bodies are compiled for float
// and double only, and run on such copies.
#pragma once

#include "common/types.h"
#include "cpu/clones.h"

namespace pyadv {
namespace cpu {

struct WidenLoop {
  template <class T>
  PYADV_HD static void run(const T* from, float* to, int64_t n) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  }
};

struct NarrowLoop {
  template <class T>
  PYADV_HD static void run(const float* from, T* to, int64_t n) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
  }
};

}  // namespace cpu
}  // namespace pyadv
