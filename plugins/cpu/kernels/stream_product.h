// Products whose weights need no block: float32, 16-bit floats widened in registers, and bytes with integer sums. One
// accumulator per (row, column); several tiles at once where the rows are few, so that chains hide their latency.
//
// A tile and one k: 64 bytes of float32, 32 of 16 bits; one multiply-add a row. Four k of bytes: 64, one dot product a row.

struct FloatStream {
  using Sum = F;
  static constexpr int kStep = 1, kBytes = 64;  // k and bytes of a tile that are read together
  struct Weight { F w; };
  static Weight read(const uint8_t* p, int part) { return {load(reinterpret_cast<const float*>(p) + part * W)}; }
  static F begin(const Product&, int64_t) { return zero(); }
  static F step(F sum, const Weight& w, const Product& p, int64_t m, int64_t k) { return fma(w.w, set(p.from.x[m * p.weights.K + k]), sum); }
  static F last(F sum, const Weight&, const Product&, int64_t, int64_t) { return sum; }
  static F end(F sum, const Product&, int64_t, int64_t, int) { return sum; }
};

struct HalfStream : FloatStream {
  static constexpr int kBytes = 32;
  static Weight read(const uint8_t* p, int part) { return {load_half(reinterpret_cast<const uint16_t*>(p) + part * W)}; }
};

struct PairStream : FloatStream {  // a word holds two k of a column, the even one in its low half
  static constexpr int kStep = 2, kBytes = 64;
  struct Weight { F even, odd; };
  static Weight read(const uint8_t* p, int part) {
    const U both = load_bytes(p + part * 4 * W);
    return {widen_even(both), widen_odd(both)};
  }
  static F step(F sum, const Weight& w, const Product& p, int64_t m, int64_t k) {
    const float* x = p.from.x + m * p.weights.K + k;
    return fma(w.odd, set(x[1]), fma(w.even, set(x[0]), sum));
  }
  static F last(F sum, const Weight& w, const Product& p, int64_t m, int64_t k) { return fma(w.even, set(p.from.x[m * p.weights.K + k]), sum); }
};

struct ByteStream {
  using Sum = I;
  static constexpr int kStep = 4, kBytes = 64;
  struct Weight { U w; };
  static int64_t padded(const Product& p) { return (p.weights.K + 3) / 4 * 4; }
  static Weight read(const uint8_t* p, int part) { return {load_bytes(p + part * 4 * W)}; }
  static I begin(const Product& p, int64_t m) { return set_int(p.from.start[m]); }
  static I step(I sum, const Weight& w, const Product& p, int64_t m, int64_t k) {
    int32_t a;
    __builtin_memcpy(&a, p.from.q + m * padded(p) + k, 4);
    return dot_byte(sum, w.w, a);
  }
  static I last(I sum, const Weight& w, const Product& p, int64_t m, int64_t k) { return step(sum, w, p, m, k); }
  static F end(I sum, const Product& p, int64_t m, int64_t tile, int part) {
    return mul(mul(to_float(sum), set(p.from.scale[m])), load(reinterpret_cast<const float*>(p.weights.scale) + tile * kTile + part * W));
  }
};

constexpr int kStreamAhead = 1024;  // bytes, in each of the tiles read together

// M rows of C neighbouring tiles, the columns of one register in each.
template <class Stream, int M, int C>
inline void stream_columns(const Product& p, int64_t m0, int64_t tile, int part) {
  const Weights& w = p.weights;
  const int64_t steps = w.K / Stream::kStep, tile_bytes = (w.K + Stream::kStep - 1) / Stream::kStep * Stream::kBytes;
  const uint8_t* data = w.data + tile * tile_bytes;
  typename Stream::Sum sums[M][C];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) sums[m][c] = Stream::begin(p, m0 + m);
  for (int64_t k = 0; k < steps; k++) {
    typename Stream::Weight v[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      prefetch(data + c * tile_bytes + k * Stream::kBytes + kStreamAhead);
      v[c] = Stream::read(data + c * tile_bytes + k * Stream::kBytes, part);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sums[m][c] = Stream::step(sums[m][c], v[c], p, m0 + m, k * Stream::kStep);
  }
  if (steps * Stream::kStep < w.K)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      const auto v = Stream::read(data + c * tile_bytes + steps * Stream::kBytes, part);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) sums[m][c] = Stream::last(sums[m][c], v, p, m0 + m, steps * Stream::kStep);
    }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++) {
    float* y = p.y + (p.target ? p.target[m0 + m] : m0 + m) * w.N;
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) {
      const int64_t column = (tile + c) * kTile + part * W;
      const int columns = clamp_int(w.N - column, 0, W);
      const F value = Stream::end(sums[m][c], p, m0 + m, tile + c, part);
      if (columns == W) store(y + column, value);
      else if (columns) store_part(y + column, value, columns);
    }
  }
}

template <class Stream, int M>
inline int stream_tiles(const Product& p, int64_t m, int64_t tile) {  // returns how many tiles it did
  constexpr int C = M <= kWideRows ? kManyTiles : kFewTiles;
  if (tile + C <= p.tile1) {
    for (int part = 0; part < 16 / W; part++) stream_columns<Stream, M, C>(p, m, tile, part);
    return C;
  }
  for (int part = 0; part < 16 / W; part++) stream_columns<Stream, M, 1>(p, m, tile, part);
  return 1;
}

template <class Stream>
void stream_product(const Product& p) {
  constexpr int R = kProductRows;
  const int64_t whole = (p.row1 - p.row0) / R * R;
  const int rest = static_cast<int>(p.row1 - p.row0 - whole);
  int64_t tile = p.tile0;
  while (tile < p.tile1) {
    int done = 1;
    // Full groups of rows and the rest advance by the same number of tiles.
    for (int64_t m = 0; m < whole; m += R) done = stream_tiles<Stream, R>(p, p.row0 + m, tile);
    if (rest) {
      const int64_t end = whole ? tile + done : p.tile1;
      int64_t t = tile;
      Product mine = p;
      mine.tile1 = end;
      while (t < end) {
        switch (rest) {
          case 1: t += stream_tiles<Stream, 1>(mine, p.row0 + whole, t); break;
          case 2: t += stream_tiles<Stream, 2>(mine, p.row0 + whole, t); break;
          case 3: t += stream_tiles<Stream, 3>(mine, p.row0 + whole, t); break;
          default:
            if constexpr (R > 4) {
              switch (rest) {
                case 4: t += stream_tiles<Stream, 4>(mine, p.row0 + whole, t); break;
                case 5: t += stream_tiles<Stream, 5>(mine, p.row0 + whole, t); break;
                case 6: t += stream_tiles<Stream, 6>(mine, p.row0 + whole, t); break;
                default: t += stream_tiles<Stream, 7>(mine, p.row0 + whole, t);
              }
            }
        }
      }
      done = static_cast<int>(end - tile);
    }
    tile += done;
  }
}
