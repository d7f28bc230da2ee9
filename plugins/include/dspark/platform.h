// What differs between a host compiler and nvcc, and the few operations whose spelling depends on it.
//
// Everything in this folder compiles with both. Floating point is kept reproducible: every fused multiply-add is
// written out, so the library is built without contraction (-ffp-contract=off, -fmad=false) and a value computed on
// the host has the bits the device computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSPARK_HD __host__ __device__ __forceinline__
#define DSPARK_UNROLL _Pragma("unroll")
#define DSPARK_ROLLED _Pragma("unroll 1")
#else
#define DSPARK_HD inline
#define DSPARK_UNROLL
#define DSPARK_ROLLED
#endif

// The device's view of a block: on the device, or where a test imitates one (DSPARK_EMULATED) to run the kernels.
#if defined(__CUDA_ARCH__) || defined(DSPARK_EMULATED)
#define DSPARK_ON_DEVICE 1
#endif
#if defined(__CUDACC__) || defined(DSPARK_EMULATED)
#define DSPARK_HAS_DEVICE 1
#endif

namespace dspark {

template <class To, class From> DSPARK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Upper and lower 64 bits of a product.
DSPARK_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 wide;
  return static_cast<uint64_t>((static_cast<wide>(a) * b) >> 64);
#endif
}

template <class T> DSPARK_HD T smaller(T a, T b) { return b < a ? b : a; }
template <class T> DSPARK_HD T larger(T a, T b) { return a < b ? b : a; }

}  // namespace dspark
