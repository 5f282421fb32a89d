// Runs a loop with the widest instruction set the processor has, chosen at run time. The one place
// with a compiler builtin for a processor; elsewhere the baseline loop is used.
#pragma once

#include <utility>

#include "common/macros.h"

namespace pyadv {
namespace cpu {

// `Loop` is a struct with a static, always inlined `run(args...)`.
#if defined(__x86_64__) && defined(__GNUC__)
inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
}

template <class Loop, class... Args>
__attribute__((target("avx2"))) void run_avx2(Args... args) {
  Loop::run(args...);
}

template <class Loop, class... Args>
void run_baseline(Args... args) {
  Loop::run(args...);
}

template <class Loop, class... Args>
void run(Args... args) {
  has_avx2() ? run_avx2<Loop>(args...) : run_baseline<Loop>(args...);
}
#else
template <class Loop, class... Args>
void run(Args... args) {
  Loop::run(args...);
}
#endif

}  // namespace cpu
}  // namespace pyadv
