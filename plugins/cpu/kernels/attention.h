// Attention in the order of the sequence.
//
// A chunk of 256 places against up to 48 rows (token x head of the group): keys are turned 16 at a time, so that a lane is a
// place and a score one chain over the head's width; values are added place by place, so that a lane is a column. Bytes are
// those of the keys and values, once for all rows of a block; operations are 2 multiply-adds a row, place and column, and the
// turning, 16 shuffles a place at width 64.

inline float exp_one(float x) {
  float y[16];
  wide_store(y, exponential(wide(x)));
  return y[0];
}

void merge(float* maximum, float* sum, float* values, float other_maximum, float other_sum, const float* other_values, int64_t width) {
  const float top = *maximum > other_maximum ? *maximum : other_maximum;
  const float keep = exp_one(*maximum - top), take = exp_one(other_maximum - top);
  *maximum = top;
  *sum = __builtin_fmaf(*sum, keep, other_sum * take);
  const Wide k = wide(keep), t = wide(take);
  for (int64_t v = 0; v < width; v += 16) {
    const Wide other = other_values ? wide_load(other_values + v, width - v) : wide(0);
    wide_store(values + v, fma(wide_load(values + v, width - v), k, mul(other, t)), width - v);
  }
}

void finish(float sum_of, const float* values, int64_t width, float* y) {
  const Wide by = wide(sum_of == 0 ? 0.0f : 1.0f / sum_of);
  for (int64_t v = 0; v < width; v += 16) wide_store(y + v, mul(wide_load(values + v, width - v), by), width - v);
}

void turn(const Turn& t) {
  const int64_t half = t.turned / 2;
  if (t.interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = t.x[2 * i], b = t.x[2 * i + 1], c = t.cos[i], s = t.sin[i];
      t.y[2 * i] = __builtin_fmaf(a, c, -(b * s)) * t.scale;
      t.y[2 * i + 1] = __builtin_fmaf(b, c, a * s) * t.scale;
    }
  } else {
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t n = half - i;
      const Wide a = wide_load(t.x + i, n), b = wide_load(t.x + half + i, n), c = wide_load(t.cos + i, n), s = wide_load(t.sin + i, n);
      wide_store(t.y + i, mul(fma(a, c, sub(wide(0), mul(b, s))), wide(t.scale)), n);
      wide_store(t.y + half + i, mul(fma(b, c, mul(a, s)), wide(t.scale)), n);
    }
  }
  for (int64_t i = t.turned; i < t.width; i += 16) wide_store(t.y + i, mul(wide_load(t.x + i, t.width - i), wide(t.scale)), t.width - i);
}

inline void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) prefetch(p + i);
}

// 16 keys or fewer, [width][16], zeros for those that are missing.
inline void turn_keys(const float* key, int64_t width, int keys, float* turned) {
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) transpose16(key + d, width, keys, turned + 16 * d);
  for (; d < width; d++)
    for (int i = 0; i < 16; i++) turned[16 * d + i] = i < keys ? key[i * width + d] : 0.0f;
}

template <int R>
inline void score_rows(const float* turned, int64_t width, const float* query, float* scores, int64_t stride) {
  Wide sums[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sums[r] = wide(0);
  for (int64_t d = 0; d < width; d++) {
    const Wide key = wide_load(turned + 16 * d);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const F q = set(query[r * width + d]);
#pragma GCC unroll 16
      for (int i = 0; i < Wide::kParts; i++) sums[r].r[i] = fma(key.r[i], q, sums[r].r[i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) wide_store(scores + r * stride, sums[r]);
}

template <int R>
inline void score_up_to(int rows, const float* turned, int64_t width, const float* query, float* scores, int64_t stride) {
  if (rows == R) return score_rows<R>(turned, width, query, scores, stride);
  if constexpr (R > 1) score_up_to<R - 1>(rows, turned, width, query, scores, stride);
}

// Scores of `rows` rows against 16 keys.
inline void scores_of(const float* turned, int64_t width, const float* query, int rows, float* scores, int64_t stride) {
  for (int r = 0; r < rows; r += kScoreRows)
    score_up_to<kScoreRows>(static_cast<int>(least(kScoreRows, rows - r)), turned, width, query + r * width, scores + r * stride, stride);
}

inline F load_columns(const float* p, int n) { return n == W ? load(p) : load_part(p, n); }

// Columns of C registers (the last of `part` columns), R rows: sums += weight of a place * its values, place by place.
template <int R, int C>
inline void value_rows(const float* value, int64_t width, const int16_t* places, int count, const float* weights, float* sums, int part) {
  F a[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) a[r][c] = zero();
  for (int i = 0; i < count; i++) {
    const float* v = value + places[i] * width;
    F x[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) x[c] = c < C - 1 ? load(v + W * c) : load_columns(v + W * c, part);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const F by = set(weights[r * kChunk + places[i]]);
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) a[r][c] = fma(x[c], by, a[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++)
      if (c < C - 1 || part == W) store(sums + r * width + W * c, a[r][c]);
      else store_part(sums + r * width + W * c, a[r][c], part);
}

template <int R, int C>
inline void value_up_to(int rows, const float* value, int64_t width, const int16_t* places, int count, const float* weights, float* sums, int part) {
  if (rows == R) return value_rows<R, C>(value, width, places, count, weights, sums, part);
  if constexpr (R > 1) value_up_to<R - 1, C>(rows, value, width, places, count, weights, sums, part);
}

inline void values_of(const float* value, int64_t width, const int16_t* places, int count, const float* weights, int rows, float* sums) {
  for (int r = 0; r < rows; r += kValueRows) {
    const int now = static_cast<int>(least(kValueRows, rows - r));
    int64_t v = 0;
    for (; v + kValueParts * W <= width; v += kValueParts * W)
      value_up_to<kValueRows, kValueParts>(now, value + v, width, places, count, weights + r * kChunk, sums + r * width + v, W);
    for (; v < width; v += W)
      value_up_to<kValueRows, 1>(now, value + v, width, places, count, weights + r * kChunk, sums + r * width + v, static_cast<int>(least(W, width - v)));
  }
}

// What the rows of a block see of a chunk.
struct ChunkView {
  uint16_t direct[kGroups];     // places that some row sees in the slot of their number
  uint16_t used[kGroups];       // the same, and those of keys that lie elsewhere
  bool others;
};

struct Block {
  const Attend& a;
  int rows;
  int64_t tail;                 // width of `elsewhere`
  float *turned, *weights, *elsewhere, *sums;
  bool have_elsewhere = false;

  explicit Block(const Attend& given)
      : a(given), rows(static_cast<int>(given.row1 - given.row0)), tail((given.start + given.tokens - given.direct + 15) / 16 * 16),
        turned(given.scratch), weights(turned + 16 * given.key_width), elsewhere(weights + kRowBlock * kChunk), sums(elsewhere + kRowBlock * tail) {}

  int64_t token(int row) const { return (a.row0 + row) / a.group; }
  const uint16_t* bits(int64_t t, int64_t chunk) const { return a.bits + (t * a.bits_chunks + chunk) * kGroups; }

  // Keys of a token in other slots than their places', those of this chunk.
  void others_of(int64_t t, int64_t chunk, const Visible** from, const Visible** to) const {
    const Visible *i = a.others + a.first[t], *end = a.others + a.first[t + 1];
    while (i < end && i->place < chunk * kChunk) i++;
    *from = i;
    while (i < end && i->place < (chunk + 1) * kChunk) i++;
    *to = i;
  }

  ChunkView view(int64_t chunk) const {
    ChunkView v = {};
    for (int64_t t = token(0); t <= token(rows - 1); t++) {
      if (chunk < a.bits_chunks)
        for (int g = 0; g < kGroups; g++) v.direct[g] = static_cast<uint16_t>(v.direct[g] | bits(t, chunk)[g]);
      const Visible *i, *end;
      for (others_of(t, chunk, &i, &end); i < end; i++) {
        v.others = true;
        const int at = static_cast<int>(i->place - chunk * kChunk);
        v.used[at / 16] = static_cast<uint16_t>(v.used[at / 16] | 1 << at % 16);
      }
    }
    for (int g = 0; g < kGroups; g++) v.used[g] = static_cast<uint16_t>(v.used[g] | v.direct[g]);
    return v;
  }

  void score_elsewhere() {
    if (have_elsewhere) return;
    have_elsewhere = true;
    const int64_t keys = a.start + a.tokens - a.direct;
    for (int64_t i = 0; i < keys; i += 16) {
      turn_keys(a.key + (a.direct + i) * a.key_width, a.key_width, static_cast<int>(least(16, keys - i)), turned);
      scores_of(turned, a.key_width, a.query + a.row0 * a.key_width, rows, elsewhere + i, tail);
    }
  }

  void score(int64_t chunk, const ChunkView& v) {
    if (v.others) score_elsewhere();
    for (int g = 0; g < kGroups; g++) {
      if (!v.direct[g]) continue;
      const int64_t slot = chunk * kChunk + 16 * g;
      fetch(a.key + (slot + 16) * a.key_width, 16 * a.key_width);  // the next ones, and what these will be asked for
      fetch(a.value + slot * a.value_width, 16 * a.value_width);
      turn_keys(a.key + slot * a.key_width, a.key_width, static_cast<int>(least(16, a.direct - slot)), turned);
      scores_of(turned, a.key_width, a.query + a.row0 * a.key_width, rows, weights + 16 * g, kChunk);
    }
  }

  // Scores of a row to weights; its keys elsewhere keep theirs in `elsewhere`. Returns maximum and sum.
  void soften(int row, int64_t chunk, const ChunkView& v, float* maximum, float* sum_of) {
    float* w = weights + row * kChunk;
    const int64_t t = token(row);
    uint16_t seen[kGroups] = {};
    if (chunk < a.bits_chunks) __builtin_memcpy(seen, bits(t, chunk), sizeof seen);
    const Visible *from, *to;
    others_of(t, chunk, &from, &to);
    for (const Visible* i = from; i < to; i++) {
      const int at = static_cast<int>(i->place - chunk * kChunk);
      w[at] = elsewhere[row * tail + i->slot - a.direct];
      seen[at / 16] = static_cast<uint16_t>(seen[at / 16] | 1 << at % 16);
    }
    const Wide none = wide(-__builtin_inff()), cap = wide(a.softcap);
    Wide top = none;
    unsigned all = 0;
    for (int g = 0; g < kGroups; g++) {
      if (!v.used[g]) continue;
      all |= seen[g];
      Wide s = wide_load(w + 16 * g);
      if (a.softcap > 0) s = mul(cap, tangent(div(s, cap)));
      s = keep_bits(s, seen[g], none);
      wide_store(w + 16 * g, s);
      top = max(s, top);
    }
    *maximum = largest(top);
    *sum_of = 0;
    if (!all) {
      for (int g = 0; g < kGroups; g++)
        if (v.used[g]) wide_store(w + 16 * g, wide(0));
      return;
    }
    const Wide m = wide(*maximum);
    Wide total = wide(0);
    for (int g = 0; g < kGroups; g++) {
      if (!v.used[g]) continue;
      const Wide e = keep_bits(exponential(sub(wide_load(w + 16 * g), m)), seen[g], wide(0));
      wide_store(w + 16 * g, e);
      total = add(total, e);
    }
    *sum_of = sum(total);
    for (const Visible* i = from; i < to; i++) {
      const int at = static_cast<int>(i->place - chunk * kChunk);
      elsewhere[row * tail + i->slot - a.direct] = w[at];
      w[at] = 0;
    }
  }

  void add_values(int64_t chunk, const ChunkView& v, float* to_values) {
    int16_t places[kChunk];
    int count = 0;
    for (int g = 0; g < kGroups; g++)
      for (unsigned bits = v.direct[g]; bits; bits &= bits - 1) places[count++] = static_cast<int16_t>(16 * g + __builtin_ctz(bits));
    const int64_t width = a.value_width;
    values_of(a.value + chunk * kChunk * width, width, places, count, weights, rows, to_values);
    if (!v.others) return;
    for (int row = 0; row < rows; row++) {
      const Visible *i, *end;
      for (others_of(token(row), chunk, &i, &end); i < end; i++) {
        const Wide by = wide(elsewhere[row * tail + i->slot - a.direct]);
        const float* x = a.value + i->slot * width;
        float* y = to_values + row * width;
        for (int64_t c = 0; c < width; c += 16)
          wide_store(y + c, fma(wide_load(x + c, width - c), by, wide_load(y + c, width - c)), width - c);
      }
    }
  }
};

void attend(const Attend& a) {
  Block block(a);
  float maximum[kRowBlock], sums[kRowBlock];
  if (a.merge) {
    for (int r = 0; r < block.rows; r++) a.maximum[r] = -__builtin_inff(), a.sum[r] = 0;
    for (int64_t i = 0; i < block.rows * a.value_width; i++) a.values[i] = 0;
  }
  for (int64_t chunk = a.chunk0; chunk < a.chunk1; chunk++) {
    const ChunkView v = block.view(chunk);
    unsigned any = 0;
    for (const uint16_t u : v.used) any |= u;
    const int64_t at = (chunk - a.chunk0) * a.result_rows;
    float* m = a.merge ? maximum : a.maximum + at;
    float* l = a.merge ? sums : a.sum + at;
    float* values = a.merge ? block.sums : a.values + at * a.value_width;
    if (!any) {
      if (!a.merge)
        for (int r = 0; r < block.rows; r++) l[r] = 0;
      continue;
    }
    block.score(chunk, v);
    for (int r = 0; r < block.rows; r++) block.soften(r, chunk, v, m + r, l + r);
    block.add_values(chunk, v, values);
    if (a.merge)
      for (int r = 0; r < block.rows; r++)
        if (l[r] != 0) merge(a.maximum + r, a.sum + r, a.values + r * a.value_width, m[r], l[r], values + r * a.value_width, a.value_width);
  }
}
