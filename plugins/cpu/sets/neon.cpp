// flags: -march=armv8.2-a+dotprod
// NEON with dot products: 4 lanes, four registers for the 16 columns of a tile.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "../kernels.h"

namespace dspark {
namespace {

constexpr int W = 4;
constexpr int kProductRows = 4;
constexpr int kWideRows = 4;
constexpr int kManyTiles = 4, kFewTiles = 4;
constexpr int kScoreRows = 4, kValueRows = 4, kValueParts = 4;
constexpr int kByteOffset = 128;  // dot_byte takes weights less 128

using F = float32x4_t;
using I = int32x4_t;
using U = uint8x16_t;

inline F zero() { return vdupq_n_f32(0); }
inline F set(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline F load_part(const float* p, int n) {
  float v[4] = {};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return vld1q_f32(v);
}
inline F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline void store_part(float* p, F x, int n) {
  float v[4];
  vst1q_f32(v, x);
  for (int i = 0; i < n; i++) p[i] = v[i];
}
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is NaN
inline F min(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F root(F a) { return vsqrtq_f32(a); }
inline F absolute(F a) { return vabsq_f32(a); }
inline F sign_of(F magnitude, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
inline F nearest(F a) { return vrndnq_f32(a); }
inline F power_of_two(I n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline F times_power(F a, F n) {  // in two steps: the power itself may lie outside the normal numbers where the result does not
  const I power = vcvtnq_s32_f32(n), first = vshrq_n_s32(power, 1);
  return mul(mul(a, power_of_two(first)), power_of_two(vsubq_s32(power, first)));
}
inline F where_less(F a, F b, F yes, F no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline F keep_bits(F a, unsigned bits, F otherwise) {
  static constexpr uint32_t one[4] = {1, 2, 4, 8};
  return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(one)), a, otherwise);
}
inline float sum_lanes(F a) {
  const float32x2_t pair = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}

inline I set_int(int32_t x) { return vdupq_n_s32(x); }
inline F to_float(I a) { return vcvtq_f32_s32(a); }
inline I to_int(F a) { return vcvtnq_s32_f32(a); }
inline I bits_of(F a) { return vreinterpretq_s32_f32(a); }
inline I max_int(I a, I b) { return vmaxq_s32(a, b); }
inline I add_int(I a, I b) { return vaddq_s32(a, b); }
inline void store_int(int32_t* p, I a) { vst1q_s32(p, a); }
inline void store_bytes(int8_t* p, I a) {
  int32_t v[4];
  vst1q_s32(v, a);
  for (int i = 0; i < 4; i++) p[i] = static_cast<int8_t>(v[i]);
}

inline U load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline U low(U a) { return vandq_u8(a, vdupq_n_u8(15)); }
inline U high(U a) { return vshrq_n_u8(a, 4); }
inline int8x16_t four_of(int32_t a) { return vreinterpretq_s8_s32(vdupq_n_s32(a)); }
inline I dot_nibble(I sum, U w, int32_t a) { return vdotq_s32(sum, vreinterpretq_s8_u8(w), four_of(a)); }
inline I dot_byte(I sum, U w, int32_t a) { return vdotq_s32(sum, vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128))), four_of(a)); }
inline F widen_even(U a) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(a), 16)); }
inline F widen_odd(U a) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(a), vdupq_n_u32(0xffff0000u))); }
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// y[d * 16 + key] = x[key * stride + d] for 16 columns d and `keys` keys; 0 for the keys from there to 16
inline void transpose16(const float* x, int64_t stride, int keys, float* y) {
  for (int key = 0; key < 16; key += 4)
    for (int d = 0; d < 16; d += 4) {
      F r[4];
      for (int i = 0; i < 4; i++) r[i] = key + i < keys ? load(x + (key + i) * stride + d) : zero();
      const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
      float* to = y + 16 * d + key;
      store(to, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
      store(to + 16, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
      store(to + 32, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
      store(to + 48, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }
}

inline void mask_bits(const uint8_t* mask, int64_t count, uint16_t* bits) {
  static constexpr uint8_t weight[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  for (int g = 0; g < kGroups; g++, count -= 16) {
    unsigned seen = 0;
    if (count >= 16) {
      const uint8x16_t m = vld1q_u8(mask + 16 * g), on = vandq_u8(vtstq_u8(m, m), vld1q_u8(weight));
      seen = vaddv_u8(vget_low_u8(on)) | static_cast<unsigned>(vaddv_u8(vget_high_u8(on))) << 8;
    } else {
      for (int i = 0; i < count; i++) seen |= static_cast<unsigned>(mask[16 * g + i] != 0) << i;
    }
    bits[g] = static_cast<uint16_t>(seen);
  }
}

#include "../kernels/all.h"

}  // namespace

const Set kNeon = DSPARK_SET("neon");

}  // namespace dspark
#endif
