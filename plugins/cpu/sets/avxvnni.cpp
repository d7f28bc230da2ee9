// flags: -mavx2 -mfma -mf16c -mavxvnni
// AVX2 with the VNNI dot product (AVX-VNNI).
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "../kernels.h"

#define DSPARK_VNNI 1

namespace dspark {
namespace {

#include "../kernels/avx2.h"
#include "../kernels/all.h"

}  // namespace

const Set kAvxVnni = DSPARK_SET("avxvnni");

}  // namespace dspark
#endif
