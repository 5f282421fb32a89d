// Macros that let one functor compile for the host (g++, clang) and the device (nvcc).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYADV_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline compiles a functor with the instruction set of the loop that calls it.
#define PYADV_HD inline __attribute__((always_inline))
#else
#define PYADV_HD inline
#endif

// always_inline for a lambda; goes between its parameters and its body.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define PYADV_INLINE_LAMBDA __attribute__((always_inline))
#else
#define PYADV_INLINE_LAMBDA
#endif

// Declares that the iterations of the next loop are independent. Without it the compiler's alias
// check would run the scalar loop whenever `out` equals an input (in place).
#if defined(__clang__)
#define PYADV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define PYADV_INDEPENDENT _Pragma("GCC ivdep")
#else
#define PYADV_INDEPENDENT
#endif
