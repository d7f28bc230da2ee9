// What a drafter asks of the logits of a slot: their softmax, and the most likely columns.
//
// Columns are looked at in pieces of kColumns, each small enough for the nearest cache: a piece is read twice. Statistics of
// pieces are merged in order, so that they do not depend on who computes which piece.

// Sixteen lanes from k on, `otherwise` past the end.
inline Wide lanes_of(const float* x, int64_t left, float otherwise) {
  const Wide v = wide_load(x, left);
  return left < 16 ? keep_bits(v, (1u << left) - 1, wide(otherwise)) : v;
}

// x += base + added (null: none). Maximum, and sum of exp(x - maximum); a sum of 0 where nothing is above -infinity.
void likely(float* x, const float* base, const float* added, int64_t n, float* maximum, float* sum_of) {
  Wide top = wide(-__builtin_inff());
  for (int64_t k = 0; k < n; k += 16) {
    Wide v = add(wide_load(x + k, n - k), wide_load(base + k, n - k));
    if (added) v = add(v, wide_load(added + k, n - k));
    wide_store(x + k, v, n - k);
    top = max(lanes_of(x + k, n - k, -__builtin_inff()), top);
  }
  *maximum = largest(top);
  *sum_of = 0;
  if (*maximum == -__builtin_inff()) return;
  const Wide m = wide(*maximum);
  *sum_of = sum_row(n, [&](int64_t k, int64_t left, const Wide& s) { return add(s, exponential(sub(lanes_of(x + k, left, -__builtin_inff()), m))); });
}

// y = exp(x / heat - maximum); returns the sum.
float spread(const float* x, int64_t n, float heat, float maximum, float* y) {
  const Wide by = wide(heat), m = wide(maximum);
  return sum_row(n, [&](int64_t k, int64_t left, const Wide& s) {
    const Wide e = exponential(sub(div(lanes_of(x + k, left, -__builtin_inff()), by), m));
    wide_store(y + k, e, left);
    return add(s, lanes_of(y + k, left, 0));
  });
}

// The k largest of a row so far, largest first, of equal ones the first first: absorbs the columns [first, first + n), which
// follow all columns before. Returns how many there are. NaN counts as -infinity.
int64_t top(const float* x, int64_t n, int64_t first, int64_t k, int64_t have, float* values, int32_t* columns) {
  constexpr int64_t kGroup = 64;
  for (int64_t g = 0; g < n; g += kGroup) {
    const int64_t end = least(n, g + kGroup);
    if (have == k) {
      Wide m = wide(-__builtin_inff());
      for (int64_t i = g; i < end; i += 16) m = max(lanes_of(x + i, end - i, -__builtin_inff()), m);
      if (!(largest(m) > values[k - 1])) continue;
    }
    for (int64_t i = g; i < end; i++) {
      const float v = x[i] == x[i] ? x[i] : -__builtin_inff();
      if (have == k && !(v > values[k - 1])) continue;
      int64_t at = have < k ? have++ : k - 1;
      for (; at > 0 && v > values[at - 1]; at--) values[at] = values[at - 1], columns[at] = columns[at - 1];
      values[at] = v;
      columns[at] = static_cast<int32_t>(first + i);
    }
  }
  return have;
}
