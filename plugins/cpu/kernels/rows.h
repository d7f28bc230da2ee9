// Norms and activations, row by row. Sums of a row run in 64 lanes (column k in lane k % 64) that are added in a fixed tree.

template <class Term>
inline float sum_row(int64_t n, Term term) {
  Wide s[4] = {wide(0), wide(0), wide(0), wide(0)};
  for (int64_t k = 0; k < n; k += 64)
    for (int i = 0; i < 4; i++)
      if (k + 16 * i < n) s[i] = term(k + 16 * i, n - k - 16 * i, s[i]);
  return sum(add(add(s[0], s[2]), add(s[1], s[3])));
}

void rms_norm(const float* x, const float* skip, const float* weight, int64_t n, float epsilon, float* y, float* sum_to) {
  if (skip) {
    for (int64_t k = 0; k < n; k += 16) wide_store(sum_to + k, add(wide_load(x + k, n - k), wide_load(skip + k, n - k)), n - k);
    x = sum_to;
  }
  const float squares = sum_row(n, [&](int64_t k, int64_t left, const Wide& s) {
    const Wide v = wide_load(x + k, left);
    return fma(v, v, s);
  });
  const Wide by = wide(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon));
  for (int64_t k = 0; k < n; k += 16) wide_store(y + k, mul(mul(wide_load(x + k, n - k), by), wide_load(weight + k, n - k)), n - k);
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float epsilon, float* y) {
  const float total = sum_row(n, [&](int64_t k, int64_t left, const Wide& s) { return add(s, wide_load(x + k, left)); });
  const float mean = total / static_cast<float>(n);
  const float squares = sum_row(n, [&](int64_t k, int64_t left, const Wide& s) {
    Wide v = sub(wide_load(x + k, left), wide(mean));
    if (left < 16) v = keep_bits(v, (1u << left) - 1, wide(0));
    return fma(v, v, s);
  });
  const Wide by = wide(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon));
  for (int64_t k = 0; k < n; k += 16) {
    const Wide v = mul(sub(wide_load(x + k, n - k), wide(mean)), by);
    wide_store(y + k, fma(v, wide_load(weight + k, n - k), wide_load(bias + k, n - k)), n - k);
  }
}

void gate(Activation kind, const float* gates, const float* up, int64_t n, float* y) {
  for (int64_t k = 0; k < n; k += 16)
    wide_store(y + k, mul(activation(kind, wide_load(gates + k, n - k), wide(1)), wide_load(up + k, n - k)), n - k);
}

void unary(Activation kind, const float* x, int64_t n, float cap, float* y) {
  for (int64_t k = 0; k < n; k += 16) wide_store(y + k, activation(kind, wide_load(x + k, n - k), wide(cap)), n - k);
}
