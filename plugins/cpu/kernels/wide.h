// Sixteen lanes of any set: 16 / W registers.

struct Wide {
  static constexpr int kParts = 16 / W;
  F r[kParts];
};

template <class Function>
inline Wide parts(Function f) {
  Wide y;
  for (int i = 0; i < Wide::kParts; i++) y.r[i] = f(i);
  return y;
}

inline int clamp_int(int64_t x, int low_end, int high_end) { return x < low_end ? low_end : x > high_end ? high_end : static_cast<int>(x); }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline Wide wide(float x) { return parts([&](int) { return set(x); }); }
inline Wide wide_load(const float* p) { return parts([&](int i) { return load(p + W * i); }); }
inline Wide wide_load(const float* p, int64_t n) {  // 0 from n on; reads nothing there
  if (n >= 16) return wide_load(p);
  return parts([&](int i) {
    const int k = clamp_int(n - W * i, 0, W);
    return k ? load_part(p + W * i, k) : zero();
  });
}
inline void wide_store(float* p, const Wide& x) { for (int i = 0; i < Wide::kParts; i++) store(p + W * i, x.r[i]); }
inline void wide_store(float* p, const Wide& x, int64_t n) {
  if (n >= 16) return wide_store(p, x);
  for (int i = 0; i < Wide::kParts; i++)
    if (const int k = clamp_int(n - W * i, 0, W)) store_part(p + W * i, x.r[i], k);
}

#define DSPARK_LIFT1(f) inline Wide f(const Wide& a) { return parts([&](int i) { return f(a.r[i]); }); }
#define DSPARK_LIFT2(f) inline Wide f(const Wide& a, const Wide& b) { return parts([&](int i) { return f(a.r[i], b.r[i]); }); }
DSPARK_LIFT1(root)
DSPARK_LIFT1(absolute)
DSPARK_LIFT1(nearest)
DSPARK_LIFT2(add)
DSPARK_LIFT2(sub)
DSPARK_LIFT2(mul)
DSPARK_LIFT2(div)
DSPARK_LIFT2(max)
DSPARK_LIFT2(min)
DSPARK_LIFT2(sign_of)
DSPARK_LIFT2(times_power)
#undef DSPARK_LIFT1
#undef DSPARK_LIFT2
inline Wide fma(const Wide& a, const Wide& b, const Wide& c) { return parts([&](int i) { return fma(a.r[i], b.r[i], c.r[i]); }); }
inline Wide where_less(const Wide& a, const Wide& b, const Wide& yes, const Wide& no) {
  return parts([&](int i) { return where_less(a.r[i], b.r[i], yes.r[i], no.r[i]); });
}
inline Wide keep_bits(const Wide& a, unsigned bits, const Wide& otherwise) {
  return parts([&](int i) { return keep_bits(a.r[i], bits >> (W * i) & ((1u << W) - 1), otherwise.r[i]); });
}

// Lane j + lane j + 8, then 4, 2, 1 apart: one tree for every set.
inline float sum(const Wide& a) {
  F x = a.r[0];
  if constexpr (Wide::kParts == 2) x = add(a.r[0], a.r[1]);
  if constexpr (Wide::kParts == 4) x = add(add(a.r[0], a.r[2]), add(a.r[1], a.r[3]));
  return sum_lanes(x);
}
inline float largest(const Wide& a) {  // order does not matter; NaN stays NaN or is passed over, as max does
  float v[16];
  wide_store(v, a);
  float m = v[0];
  for (int i = 1; i < 16; i++) m = m > v[i] ? m : v[i];
  return m;
}
