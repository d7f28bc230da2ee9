// flags: -mavx2 -mfma -mf16c
// AVX2, FMA and F16C. 8-bit dot products are multiply-adds of bytes to 16 bits, then to 32.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "../kernels.h"

#define DSPARK_VNNI 0

namespace dspark {
namespace {

#include "../kernels/avx2.h"
#include "../kernels/all.h"

}  // namespace

const Set kAvx2 = DSPARK_SET("avx2");

}  // namespace dspark
#endif
