// Portability: the same functor compiles for the host (g++, clang) and the device (nvcc).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYADV_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline, so that a functor is compiled with the instruction set of the loop it is used in.
#define PYADV_HD inline __attribute__((always_inline))
#else
#define PYADV_HD inline
#endif

// Goes between the parameters and the body of a lambda, for the same reason.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define PYADV_INLINE_LAMBDA __attribute__((always_inline))
#else
#define PYADV_INLINE_LAMBDA
#endif

// The next loop has no dependence between iterations. `out` may be the same pointer as an input
// (in place), which the compiler's own alias check would send to the scalar version of the loop.
#if defined(__clang__)
#define PYADV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define PYADV_INDEPENDENT _Pragma("GCC ivdep")
#else
#define PYADV_INDEPENDENT
#endif
