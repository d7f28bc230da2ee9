// Numbers: 16-bit formats, an order on floats, exp and its relatives, and masses.
//
// A *weight* is exp((logit - top) / temperature), float32 in [0, 1]. A *mass* is the weight in fixed point, 2^44 to 1.
// Masses are integers, so their sums depend on no order: not on the number of threads, blocks or sequences of a batch.
// The sum over 262,144 tokens fits 64 bits. A weight below 2^-45 has no mass; the random numbers have 24 bits.
#pragma once

#include "dspark/platform.h"

namespace dspark {

constexpr int kMassBits = 44;
constexpr int kMaxVocab = 262144;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Storage of the 16-bit formats. The conversions are exact.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

DSPARK_HD float to_float(float value) { return value; }

DSPARK_HD float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

DSPARK_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: 2^-24 each
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
#endif
}

constexpr int kGroup = 8;  // numbers a thread reads together: 16 bytes of 16-bit ones

// data[0..kGroup), wide. On the device in words of 16 bytes where the address allows it.
template <class T> DSPARK_HD void load_group(const T* data, float* values) {
#ifdef DSPARK_ON_DEVICE
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    constexpr int kWords = kGroup * sizeof(T) / 16, kEach = 16 / sizeof(T);
    DSPARK_UNROLL
    for (int word = 0; word < kWords; ++word) {
      union {
        uint4 raw;
        T parts[kEach];
      } loaded;
      loaded.raw = reinterpret_cast<const uint4*>(data)[word];
      DSPARK_UNROLL
      for (int i = 0; i < kEach; ++i) values[word * kEach + i] = to_float(loaded.parts[i]);
    }
    return;
  }
#endif
  DSPARK_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = to_float(data[i]);
}

DSPARK_HD bool is_nan(float value) { return (bit_cast<uint32_t>(value) & 0x7fffffffu) > 0x7f800000u; }

DSPARK_HD bool is_finite(float value) { return (bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }

// Largest logit, lowest id among equals: the maximum over tokens of this number. The first NaN wins over everything,
// -0 equals +0.
DSPARK_HD uint64_t argmax_key(float logit, int32_t id) {
  uint32_t key = 0xffffffffu;
  if (!is_nan(logit)) {
    const uint32_t bits = bit_cast<uint32_t>(logit + 0.0f);
    key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

DSPARK_HD int32_t argmax_id(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

// exp(x) for x <= 0, within 1.1 units in the last place; exactly 1 at 0; 0 below 2^-126 and for NaN.
DSPARK_HD float exp_negative(float x) {
  if (!(x > -87.33f)) return 0.0f;
  const float n = rintf(x * 1.44269504f);
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.98756912e-4f;
  p = fmaf(p, r, 1.39819994e-3f);
  p = fmaf(p, r, 8.33345205e-3f);
  p = fmaf(p, r, 4.16657962e-2f);
  p = fmaf(p, r, 1.66666657e-1f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r * r, r) + 1.0f;
  return p * bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

DSPARK_HD float sigmoid(float x) {
  const float e = exp_negative(x < 0.0f ? x : -x);
  return is_nan(x) ? x : (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

DSPARK_HD float hyperbolic_tangent(float x) {
  const float size = fabsf(x);
  if (!(size > 0.125f)) {  // also NaN; the other form loses digits here
    const float s = x * x;
    return fmaf(x * s, fmaf(s, fmaf(s, -0.053968254f, 0.13333333f), -0.33333333f), x);
  }
  const float e = exp_negative(-2.0f * size);
  const float value = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -value : value;
}

DSPARK_HD uint64_t mass_of(float weight) {
#ifdef __CUDA_ARCH__
  return __float2ull_rn(weight * 17592186044416.0f);
#else
  return static_cast<uint64_t>(rintf(weight * 17592186044416.0f));  // 2^44; the product is exact
#endif
}

// A share in [0, 1] with 32 binary digits; values outside are clamped, NaN becomes 0.
DSPARK_HD uint64_t share(float value) {
  if (!(value > 0.0f)) return 0;
  return value >= 1.0f ? 0x100000000ull : static_cast<uint64_t>(value * 4294967296.0f);
}

// floor(total * uniform) below total: the token that the cumulative mass passes this in is drawn.
DSPARK_HD uint64_t draw_goal(uint64_t total, float uniform) {
  const uint64_t part = smaller<uint64_t>(share(uniform), 0xffffffffull);
  return multiply_high(total, part << 32);
}

// ceil(total * top_p), at least 1: the fewest largest tokens whose mass reaches this are kept. top_p is below 1.
DSPARK_HD uint64_t nucleus_goal(uint64_t total, float top_p) {
  const uint64_t part = smaller<uint64_t>(share(top_p), 0xffffffffull) << 32;
  const uint64_t floor = multiply_high(total, part);
  return larger<uint64_t>(floor + (total * part != 0 ? 1 : 0), 1);
}

}  // namespace dspark
