// One column of packed weights as floats: an embedding read from the head's matrix.

inline float one_half(const uint8_t* p, int64_t i) {
  uint16_t part[16] = {};
  float y[16];
  __builtin_memcpy(part, p + 2 * i, 2);
  F x = load_half(part);
  store(y, x);
  return y[0];
}
inline float one_float(const uint8_t* p, int64_t i) {
  float y;
  __builtin_memcpy(&y, p + 4 * i, 4);
  return y;
}
inline float one_scale(const Weights& w, const uint8_t* p, int64_t i) { return w.half ? one_half(p, i) : one_float(p, i); }

inline float multiply_add(float a, float b, float c) {
  float y[16];
  store(y, fma(set(a), set(b), set(c)));
  return y[0];
}

void lookup(const Weights& w, int64_t column, float* y) {
  const int64_t tile = column / kTile, c = column % kTile;
  if (w.format == Format::Float32) {
    for (int64_t k = 0; k < w.K; k++) y[k] = one_float(w.data, (tile * w.K + k) * 16 + c);
  } else if (w.format == Format::Float16) {
    for (int64_t k = 0; k < w.K; k++) y[k] = one_half(w.data, (tile * w.K + k) * 16 + c);
  } else if (w.format == Format::BFloat16) {
    const uint8_t* data = w.data + tile * ((w.K + 1) / 2) * 64;
    for (int64_t k = 0; k < w.K; k++) {
      uint32_t bits = 0;
      __builtin_memcpy(reinterpret_cast<char*>(&bits) + 2, data + k / 2 * 64 + c * 4 + k % 2 * 2, 2);
      __builtin_memcpy(y + k, &bits, 4);
    }
  } else {
    const bool nibbles = w.format == Format::Int4 || w.format == Format::Int4Minimum;
    const int offset = w.format == Format::Int4 ? 8 : w.format == Format::Int8 ? 128 : 0;
    const int64_t blocks = w.K / w.block;
    const uint8_t* data = w.data + tile * w.K * (nibbles ? 8 : 16);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t at = (tile * blocks + b) * 16 + c;
      const float scale = one_scale(w, w.scale, at), least_value = w.minimum ? one_scale(w, w.minimum, at) : 0.0f;
      for (int64_t j = 0; j < w.block; j++) {
        const int64_t k = b * w.block + j;
        const int byte = nibbles ? data[k / 8 * 64 + c * 4 + k % 4] : data[k / 4 * 64 + c * 4 + k % 4];
        const int q = (nibbles ? (k % 8 < 4 ? byte & 15 : byte >> 4) : byte) - offset;
        y[k] = w.minimum ? multiply_add(static_cast<float>(q), scale, least_value) : static_cast<float>(q) * scale;
      }
    }
  }
}
