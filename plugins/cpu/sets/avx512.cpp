// flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized
// AVX-512 with VNNI: a tile's 16 columns are one register, four k of all of them one dot product.
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "../kernels.h"

namespace dspark {
namespace {

constexpr int W = 16;
constexpr int kProductRows = 8;   // rows of a product in registers
constexpr int kWideRows = 4;      // up to this many rows, a product takes four tiles at once, else two
constexpr int kManyTiles = 4, kFewTiles = 2;
constexpr int kScoreRows = 12, kValueRows = 6, kValueParts = 4;
constexpr int kByteOffset = 0;    // dot_byte takes weights as they are

using F = __m512;
using I = __m512i;
using U = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store_part(float* p, F x, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F root(F a) { return _mm512_sqrt_ps(a); }
inline F absolute(F a) { return _mm512_abs_ps(a); }
inline F sign_of(F magnitude, F sign) { return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(sign), _mm512_set1_epi32(INT32_MIN), 0xd8)); }
inline F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_power(F a, F n) { return _mm512_scalef_ps(a, n); }
inline F where_less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
inline F keep_bits(F a, unsigned bits, F otherwise) { return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), otherwise, a); }
inline float sum_lanes(F a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline I set_int(int32_t x) { return _mm512_set1_epi32(x); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline I bits_of(F a) { return _mm512_castps_si512(a); }
inline I max_int(I a, I b) { return _mm512_max_epi32(a, b); }
inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
inline void store_int(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
inline void store_bytes(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

inline U load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline U low(U a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline U high(U a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
inline I dot_nibble(I sum, U w, int32_t a) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a)); }
inline I dot_byte(I sum, U w, int32_t a) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a)); }
inline F widen_even(U a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
inline F widen_odd(U a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)))); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// y[d * 16 + key] = x[key * stride + d] for 16 columns d and `keys` keys; 0 for the keys from there to 16
inline void transpose16(const float* x, int64_t stride, int keys, float* y) {
  F r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = i < keys ? load(x + i * stride) : zero();
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; i++) {
    const F a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const F c = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    store(y + 16 * i, _mm512_shuffle_f32x4(a, b, 0x88));
    store(y + 16 * (i + 8), _mm512_shuffle_f32x4(a, b, 0xdd));
    store(y + 16 * (i + 4), _mm512_shuffle_f32x4(c, d, 0x88));
    store(y + 16 * (i + 12), _mm512_shuffle_f32x4(c, d, 0xdd));
  }
}

inline void mask_bits(const uint8_t* mask, int64_t count, uint16_t* bits) {
  for (int g = 0; g < kGroups; g++, count -= 16) {
    const int64_t n = count < 0 ? 0 : count > 16 ? 16 : count;
    const __m128i m = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), mask + (n ? 16 * g : 0));
    bits[g] = static_cast<uint16_t>(_mm_test_epi8_mask(m, m));
  }
}

#include "../kernels/all.h"

}  // namespace

const Set kAvx512 = DSPARK_SET("avx512");

}  // namespace dspark
#endif
