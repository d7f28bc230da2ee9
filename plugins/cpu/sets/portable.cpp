// flags: -O2
// Plain C++: the reference that every other set must equal bit for bit.
#include <cmath>
#include <cstring>

#include "../kernels.h"

namespace dspark {
namespace {

constexpr int W = 16;
constexpr int kProductRows = 2;
constexpr int kWideRows = 0;
constexpr int kManyTiles = 1, kFewTiles = 1;
constexpr int kScoreRows = 2, kValueRows = 2, kValueParts = 1;
constexpr int kByteOffset = 0;

struct F { float v[W]; };
struct I { int32_t v[W]; };
struct U { uint8_t v[4 * W]; };

template <class T, class Function>
inline T lanes(Function f) {
  T y;
  for (int i = 0; i < W; i++) y.v[i] = f(i);
  return y;
}

inline int32_t as_int(float x) { int32_t y; std::memcpy(&y, &x, 4); return y; }
inline float as_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}

inline F set(float x) { return lanes<F>([&](int) { return x; }); }
inline F zero() { return set(0); }
inline F load(const float* p) { return lanes<F>([&](int i) { return p[i]; }); }
inline F load_part(const float* p, int n) { return lanes<F>([&](int i) { return i < n ? p[i] : 0.0f; }); }
inline F load_half(const uint16_t* p) { return lanes<F>([&](int i) { return half_to_float(p[i]); }); }
inline void store_part(float* p, const F& x, int n) { for (int i = 0; i < n; i++) p[i] = x.v[i]; }
inline void store(float* p, const F& x) { store_part(p, x, W); }
inline F fma(const F& a, const F& b, const F& c) { return lanes<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline F add(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F max(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(const F& a, const F& b) { return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F root(const F& a) { return lanes<F>([&](int i) { return std::sqrt(a.v[i]); }); }
inline F absolute(const F& a) { return lanes<F>([&](int i) { return std::fabs(a.v[i]); }); }
inline F sign_of(const F& a, const F& sign) { return lanes<F>([&](int i) { return std::copysign(a.v[i], sign.v[i]); }); }
inline F nearest(const F& a) { return lanes<F>([&](int i) { return std::nearbyint(a.v[i]); }); }
inline F times_power(const F& a, const F& n) {
  return lanes<F>([&](int i) {
    // Two factors: the power itself may lie outside the normal numbers where the result does not.
    if (!(n.v[i] >= -300 && n.v[i] <= 300)) return a.v[i] * n.v[i];
    const int32_t power = static_cast<int32_t>(n.v[i]), first = power / 2;
    return a.v[i] * as_float(static_cast<uint32_t>(first + 127) << 23) * as_float(static_cast<uint32_t>(power - first + 127) << 23);
  });
}
inline F where_less(const F& a, const F& b, const F& yes, const F& no) { return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; }); }
inline F keep_bits(const F& a, unsigned bits, const F& otherwise) { return lanes<F>([&](int i) { return bits >> i & 1 ? a.v[i] : otherwise.v[i]; }); }
inline float sum_lanes(F a) {
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}

inline I set_int(int32_t x) { return lanes<I>([&](int) { return x; }); }
inline F to_float(const I& a) { return lanes<F>([&](int i) { return static_cast<float>(a.v[i]); }); }
inline I to_int(const F& a) { return lanes<I>([&](int i) { return static_cast<int32_t>(std::nearbyint(a.v[i])); }); }
inline I bits_of(const F& a) { return lanes<I>([&](int i) { return as_int(a.v[i]); }); }
inline I max_int(const I& a, const I& b) { return lanes<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline I add_int(const I& a, const I& b) { return lanes<I>([&](int i) { return a.v[i] + b.v[i]; }); }
inline void store_int(int32_t* p, const I& a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_bytes(int8_t* p, const I& a) { for (int i = 0; i < W; i++) p[i] = static_cast<int8_t>(a.v[i]); }

inline U load_bytes(const uint8_t* p) { U y; std::memcpy(y.v, p, sizeof y.v); return y; }
inline U low(U a) { for (auto& v : a.v) v &= 15; return a; }
inline U high(U a) { for (auto& v : a.v) v >>= 4; return a; }
inline I dot_byte(const I& sum, const U& w, int32_t four) {
  int8_t a[4];
  std::memcpy(a, &four, 4);
  return lanes<I>([&](int i) {
    const uint8_t* v = w.v + 4 * i;
    return sum.v[i] + v[0] * a[0] + v[1] * a[1] + v[2] * a[2] + v[3] * a[3];
  });
}
inline I dot_nibble(const I& sum, const U& w, int32_t four) { return dot_byte(sum, w, four); }
inline uint32_t word(const U& a, int i) { uint32_t y; std::memcpy(&y, a.v + 4 * i, 4); return y; }
inline F widen_even(const U& a) { return lanes<F>([&](int i) { return as_float(word(a, i) << 16); }); }
inline F widen_odd(const U& a) { return lanes<F>([&](int i) { return as_float(word(a, i) & 0xffff0000u); }); }
inline void prefetch(const void*) {}

inline void transpose16(const float* x, int64_t stride, int keys, float* y) {
  for (int key = 0; key < 16; key++)
    for (int d = 0; d < 16; d++) y[16 * d + key] = key < keys ? x[key * stride + d] : 0.0f;
}

inline void mask_bits(const uint8_t* mask, int64_t count, uint16_t* bits) {
  for (int g = 0; g < kGroups; g++) {
    bits[g] = 0;
    for (int i = 0; i < 16 && 16 * g + i < count; i++) bits[g] = static_cast<uint16_t>(bits[g] | (mask[16 * g + i] != 0) << i);
  }
}

#include "../kernels/all.h"

}  // namespace

const Set kPortable = DSPARK_SET("portable");

}  // namespace dspark
