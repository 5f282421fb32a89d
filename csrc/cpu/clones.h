// Runs a loop with the processor's widest instruction set, chosen at run time. Only this header
// uses compiler builtins of one processor; other processors run the baseline loop.
#pragma once

#include <utility>

#include "common/macros.h"

namespace pyadv {
namespace cpu {

// `Loop` is a struct with a static, always inlined `run(args...)`.
#if defined(__x86_64__) && defined(__GNUC__)
#define PYADV_HAS_CLONES

inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2");
  return yes;
}

inline bool has_fma() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return yes;
}

template <class Loop, class... Args>
__attribute__((target("avx2"))) void run_avx2(Args... args) {
  Loop::run(args...);
}

// Processors without AVX2 are old: their clones are right, small and quick to compile.
#if defined(__clang__)
#define PYADV_SMALL __attribute__((minsize))
#else
#define PYADV_SMALL __attribute__((optimize("O1")))
#endif

template <class Loop, class... Args>
PYADV_SMALL void run_baseline(Args... args) {
  Loop::run(args...);
}

template <class Loop, class... Args>
void run(Args... args) {
  has_avx2() ? run_avx2<Loop>(args...) : run_baseline<Loop>(args...);
}

#if defined(__clang__)
#define PYADV_AVX512 "avx512f,avx512dq,avx512vl,avx512bw"
#else  // gcc prefers 256 bits unless told otherwise
#define PYADV_AVX512 "avx512f,avx512dq,avx512vl,avx512bw,prefer-vector-width=512"
#endif

inline bool has_avx512() {
  static const bool yes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return yes;
}

template <class Loop, class... Args>
__attribute__((target(PYADV_AVX512))) void run_avx512(Args... args) {
  Loop::run(args...);
}

// `run` with an additional AVX-512 clone, for loops that arithmetic limits while the data are in
// cache. It is a fifth faster for the Linf step of 128x3x32x32 and the losses of 1000 classes, a
// tenth for the L2 step. Every clone costs compile time, so it is not for all loops.
template <class Loop, class... Args>
void run_wide(Args... args) {
  has_avx512() ? run_avx512<Loop>(args...) : run<Loop>(args...);
}
#else
template <class Loop, class... Args>
void run(Args... args) {
  Loop::run(args...);
}

template <class Loop, class... Args>
void run_wide(Args... args) {
  Loop::run(args...);
}
#endif

}  // namespace cpu
}  // namespace pyadv
