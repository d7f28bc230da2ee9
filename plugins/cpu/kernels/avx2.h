// Registers of AVX2: 8 lanes, two registers for the 16 columns of a tile. Included by sets/avx2.cpp and sets/avxvnni.cpp,
// inside their unnamed namespaces; DSPARK_VNNI says which.

constexpr int W = 8;
constexpr int kProductRows = 4;
constexpr int kWideRows = 1;
constexpr int kManyTiles = 4, kFewTiles = 2;
constexpr int kScoreRows = 4, kValueRows = 4, kValueParts = 2;

using F = __m256;
using I = __m256i;
using U = __m256i;

inline __m256i lanes_below(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

inline F zero() { return _mm256_setzero_ps(); }
inline F set(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load_part(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
inline F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store_part(float* p, F x, int n) { _mm256_maskstore_ps(p, lanes_below(n), x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F root(F a) { return _mm256_sqrt_ps(a); }
inline F absolute(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F sign_of(F magnitude, F sign) { return _mm256_or_ps(absolute(magnitude), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign)); }
inline F nearest(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F power_of_two(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
inline F times_power(F a, F n) {  // in two steps: the power itself may lie outside the normal numbers where the result does not
  const __m256i power = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(power, 1);
  return mul(mul(a, power_of_two(first)), power_of_two(_mm256_sub_epi32(power, first)));
}
inline F where_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F keep_bits(F a, unsigned bits, F otherwise) {
  const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), one), one);
  return _mm256_blendv_ps(otherwise, a, _mm256_castsi256_ps(kept));
}
inline float sum_lanes(F a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline I set_int(int32_t x) { return _mm256_set1_epi32(x); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
inline I bits_of(F a) { return _mm256_castps_si256(a); }
inline I max_int(I a, I b) { return _mm256_max_epi32(a, b); }
inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
inline void store_int(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline void store_bytes(int8_t* p, I a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline U load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline U low(U a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline U high(U a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
#if DSPARK_VNNI
constexpr int kByteOffset = 0;  // dot_byte takes weights as they are
inline I dot_nibble(I sum, U w, int32_t a) { return _mm256_dpbusd_avx_epi32(sum, w, _mm256_set1_epi32(a)); }
inline I dot_byte(I sum, U w, int32_t a) { return _mm256_dpbusd_avx_epi32(sum, w, _mm256_set1_epi32(a)); }
#else
constexpr int kByteOffset = 128;  // dot_byte takes weights less 128
inline I add_pairs(I sum, __m256i pairs) { return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
// 15 * 127 * 2 fits 16 bits; 255 * 127 * 2 would not, so bytes are multiplied as magnitudes of at most 128.
inline I dot_nibble(I sum, U w, int32_t a) { return add_pairs(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(a))); }
inline I dot_byte(I sum, U w, int32_t a) {
  const __m256i v = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(_mm256_set1_epi32(a), v)));
}
#endif
inline F widen_even(U a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
inline F widen_odd(U a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)))); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline void transpose8(const float* x, int64_t stride, int keys, float* y) {
  F r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = i < keys ? load(x + i * stride) : zero();
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    store(y + 16 * i, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store(y + 16 * (i + 4), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// y[d * 16 + key] = x[key * stride + d] for 16 columns d and `keys` keys; 0 for the keys from there to 16
inline void transpose16(const float* x, int64_t stride, int keys, float* y) {
  for (int key = 0; key < 16; key += 8)
    for (int d = 0; d < 16; d += 8) transpose8(x + key * stride + d, stride, keys - key, y + 16 * d + key);
}

inline void mask_bits(const uint8_t* mask, int64_t count, uint16_t* bits) {
  for (int g = 0; g < kGroups; g++, count -= 16) {
    unsigned seen = 0;
    if (count >= 16) {
      const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + 16 * g));
      seen = ~static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(m, _mm_setzero_si128())));
    } else {
      for (int i = 0; i < count; i++) seen |= static_cast<unsigned>(mask[16 * g + i] != 0) << i;
    }
    bits[g] = static_cast<uint16_t>(seen);
  }
}
