// Activations to signed 8-bit integers, row by row.

constexpr float kTiny = 7.888609052210118e-31f;  // 2^-100: 127 / m stays finite

inline float largest_magnitude(const float* x, int64_t n) {  // as bits: NaN is above infinity is above every number
  I m[Wide::kParts];
  for (auto& v : m) v = set_int(0);
  for (int64_t k = 0; k < n; k += 16) {
    const Wide a = absolute(wide_load(x + k, n - k));
    for (int i = 0; i < Wide::kParts; i++) m[i] = max_int(m[i], bits_of(a.r[i]));
  }
  int32_t v[16], best = 0;
  for (int i = 0; i < Wide::kParts; i++) store_int(v + W * i, m[i]);
  for (const int32_t bits : v) best = bits > best ? bits : best;
  float y;
  __builtin_memcpy(&y, &best, 4);
  return y;
}

// n values times `factor`, rounded; returns their sum. Values beyond 127 are cut where `cut`.
inline int32_t round_values(const float* x, int64_t n, float factor, bool cut, int8_t* q) {
  I total[Wide::kParts];
  for (auto& v : total) v = set_int(0);
  for (int64_t k = 0; k < n; k += 16) {
    Wide a = mul(wide_load(x + k, n - k), wide(factor));
    if (cut) a = max(wide(-127.0f), min(wide(127.0f), a));
    int8_t tail[16];
    int8_t* to = n - k >= 16 ? q + k : tail;
    for (int i = 0; i < Wide::kParts; i++) {
      const I v = to_int(a.r[i]);
      total[i] = add_int(total[i], v);
      store_bytes(to + W * i, v);
    }
    if (to == tail)
      for (int64_t i = 0; i < n - k; i++) q[k + i] = tail[i];
  }
  int32_t v[16], sum_of = 0;
  for (int i = 0; i < Wide::kParts; i++) store_int(v + W * i, total[i]);
  for (const int32_t one : v) sum_of += one;
  return sum_of;
}

struct Rounding {
  float factor, scale;
  bool ok;
};
inline Rounding rounding(float m) {
  if (!(m <= 3.402823466e38f)) return {0, __builtin_nanf(""), false};
  return m < kTiny ? Rounding{0, 0, false} : Rounding{127.0f / m, m / 127.0f, true};
}
inline void fill_zero(int8_t* q, int64_t n) {
  for (int64_t k = 0; k < n; k++) q[k] = 0;
}

void quantize_blocks(const float* x, int64_t K, int64_t block, Format format, int64_t m, int8_t* q, float* scale, int32_t* start, float* lift) {
  const int32_t offset = format == Format::Int8          ? kByteOffset - 128
                         : format == Format::Int8Minimum ? kByteOffset
                         : format == Format::Int4        ? -8
                                                         : 0;
  for (int64_t b = 0; b < K / block; b++) {
    const Rounding by = rounding(largest_magnitude(x + b * block, block));
    const int64_t at = interleaved(m, b, K / block);
    int32_t total = 0;
    if (by.ok)
      total = round_values(x + b * block, block, by.factor, false, q + at * block);
    else
      fill_zero(q + at * block, block);
    scale[at] = by.scale;
    start[at] = offset * total;
    lift[at] = by.scale * static_cast<float>(total);
  }
}

void quantize_row(const float* x, int64_t K, float range, int8_t* q, float* scale, int32_t* start) {
  const float m = largest_magnitude(x, K);
  Rounding by = rounding(m);
  if (range > 0 && m <= 3.402823466e38f) by = {127.0f / range, range / 127.0f, true};
  int32_t total = 0;
  if (by.ok)
    total = round_values(x, K, by.factor, range > 0, q);
  else
    fill_zero(q, K);
  fill_zero(q + K, (K + 3) / 4 * 4 - K);
  *scale = by.scale;
  *start = (kByteOffset - 128) * total;
}
