// Products of 4- and 8-bit weights in blocks. Rows are independent chains; integers of a block are exact, so only the
// additions of blocks have an order, and that is ascending.
//
// A tile of 16 columns and a block of 32 k: 256 bytes of 4-bit weights or 512 of 8-bit ones, and 64 (32) bytes of scales.
// One row needs 8 (64 bytes each) dot products for it, so does each further row; unpacking 4 bits is 12 instructions, shared.

inline F load_scale(const uint8_t* p, bool half) {
  return half ? load_half(reinterpret_cast<const uint16_t*>(p)) : load(reinterpret_cast<const float*>(p));
}
inline int32_t four(const int8_t* q) {
  int32_t a;
  __builtin_memcpy(&a, q, 4);
  return a;
}

constexpr int kAhead = 3072;  // bytes of weights between what is used and what is fetched

// Columns of one register, M rows. Groups > 0: the block has that many groups of four k; 0: `groups` of them.
template <int M, bool Nibbles, int Groups>
inline void block_columns(const Product& p, int64_t m0, int64_t tile, int part, float* const* y, int columns) {
  const Weights& w = p.weights;
  const int64_t blocks = w.K / w.block, groups = Groups ? Groups : w.block / 4;
  const int64_t block = Groups ? Groups * 4 : w.block, block_bytes = block * (Nibbles ? 8 : 16), scale_bytes = w.half ? 32 : 64;
  const uint8_t* data = w.data + tile * blocks * block_bytes + part * 4 * W;
  const uint8_t* scale = w.scale + tile * blocks * scale_bytes + part * W * (w.half ? 2 : 4);
  const uint8_t* minimum = w.minimum ? w.minimum + tile * blocks * scale_bytes + part * W * (w.half ? 2 : 4) : nullptr;
  const int64_t first = interleaved(m0, 0, blocks);
  const int8_t* q = p.from.q + first * block;
  const float* by = p.from.scale + first;
  const int32_t* start = p.from.start + first;
  const float* lift = p.from.lift + first;
  F sum[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) sum[m] = zero();
  for (int64_t b = 0; b < blocks; b++) {
    if (part == 0) {
      for (int64_t i = 0; i < block_bytes; i += 64) prefetch(data + kAhead + i);
      prefetch(scale + kAhead / 4);
    }
    I dots[M];
    if constexpr (Nibbles && Groups == 8 && W == 16) {  // the whole block unpacked in registers
      U v[8];
#pragma GCC unroll 16
      for (int j = 0; j < 4; j++) {
        const U both = load_bytes(data + 64 * j);
        v[2 * j] = low(both);
        v[2 * j + 1] = high(both);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const int8_t* a = q + m * block;
        dots[m] = set_int(start[m]);
#pragma GCC unroll 16
        for (int g = 0; g < 8; g++) dots[m] = dot_nibble(dots[m], v[g], four(a + 4 * g));
      }
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) dots[m] = set_int(start[m]);
      for (int64_t g = 0; g < groups; g += Nibbles ? 2 : 1) {
        const int8_t* a = q + 4 * g;
        if constexpr (Nibbles) {
          const U both = load_bytes(data + 32 * g), even = low(both), odd = high(both);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++) {
            dots[m] = dot_nibble(dots[m], even, four(a + m * block));
            dots[m] = dot_nibble(dots[m], odd, four(a + m * block + 4));
          }
        } else {
          const U v = load_bytes(data + 64 * g);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++) dots[m] = dot_byte(dots[m], v, four(a + m * block));
        }
      }
    }
    const F s = load_scale(scale, w.half);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sum[m] = fma(mul(to_float(dots[m]), set(by[m])), s, sum[m]);
    if (minimum) {
      const F least_value = load_scale(minimum, w.half);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) sum[m] = fma(set(lift[m]), least_value, sum[m]);
      minimum += scale_bytes;
    }
    data += block_bytes;
    scale += scale_bytes;
    q += kRows * block;
    by += kRows;
    start += kRows;
    lift += kRows;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
    if (columns >= W) store(y[m], sum[m]);
    else if (columns > 0) store_part(y[m], sum[m], columns);
}

template <bool Nibbles, int Groups>
inline void block_rows(const Product& p, int64_t m0, int rows, int64_t tile) {
  for (int part = 0; part < 16 / W; part++) {
    const int64_t column = tile * kTile + part * W;
    const int columns = clamp_int(p.weights.N - column, 0, W);
    if (!columns) return;
    float* y[kRows];
    for (int m = 0; m < rows; m++) y[m] = p.y + (p.target ? p.target[m0 + m] : m0 + m) * p.weights.N + column;
    switch (rows) {
      case 1: block_columns<1, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
      case 2: block_columns<2, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
      case 3: block_columns<3, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
      case 4: block_columns<4, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
      default:
        if constexpr (kProductRows > 4) {
          switch (rows) {
            case 5: block_columns<5, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
            case 6: block_columns<6, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
            case 7: block_columns<7, Nibbles, Groups>(p, m0, tile, part, y, columns); break;
            default: block_columns<8, Nibbles, Groups>(p, m0, tile, part, y, columns);
          }
        }
    }
  }
}

template <bool Nibbles, int Groups>
void block_product(const Product& p) {
  for (int64_t tile = p.tile0; tile < p.tile1; tile++)
    for (int64_t m = p.row0, rows; m < p.row1; m += rows) {
      rows = least(least(kProductRows, kRows - m % kRows), p.row1 - m);  // of one group of interleaved rows
      block_rows<Nibbles, Groups>(p, m, static_cast<int>(rows), tile);
    }
}

void product(const Product& p) {
  const bool usual = p.weights.block == 32;
  switch (p.weights.format) {
    case Format::Float32: return stream_product<FloatStream>(p);
    case Format::Float16: return stream_product<HalfStream>(p);
    case Format::BFloat16: return stream_product<PairStream>(p);
    case Format::W8A8: return stream_product<ByteStream>(p);
    case Format::Int8:
    case Format::Int8Minimum: return usual ? block_product<false, 8>(p) : block_product<false, 0>(p);
    default: return usual ? block_product<true, 8>(p) : block_product<true, 0>(p);
  }
}
