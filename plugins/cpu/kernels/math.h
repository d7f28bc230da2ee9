// Functions over sixteen lanes, each one chain of operations. Polynomials are least-squares fits with minimax weights.

inline Wide polynomial(const Wide& x, const float* c, int n) {
  Wide y = wide(c[n - 1]);
  for (int i = n - 2; i >= 0; i--) y = fma(y, x, wide(c[i]));
  return y;
}

// e^x, relative error below 1.5e-7; 0 below -104, infinity above 88.8; NaN stays.
inline Wide exponential(const Wide& in) {
  static constexpr float c[] = {5.000000096e-01f, 1.666651831e-01f, 4.166620414e-02f, 8.368953523e-03f, 1.395060218e-03f};
  const Wide x = max(wide(-110.0f), min(wide(100.0f), in));
  const Wide n = nearest(mul(x, wide(1.44269504f)));
  Wide r = fma(n, wide(-0.693359375f), x);
  r = fma(n, wide(2.12194440e-4f), r);
  return times_power(fma(polynomial(r, c, 5), mul(r, r), add(r, wide(1.0f))), n);
}

inline Wide sigmoid(const Wide& x) { return div(wide(1.0f), add(wide(1.0f), exponential(sub(wide(0.0f), x)))); }

inline Wide tangent(const Wide& x) {  // hyperbolic
  static constexpr float c[] = {-3.333328393e-01f, 1.333149128e-01f, -5.374349792e-02f, 2.065058679e-02f, -5.717044515e-03f};
  const Wide a = absolute(x), s = mul(x, x);
  const Wide near_zero = fma(mul(polynomial(s, c, 5), s), x, x);
  const Wide far = sub(wide(1.0f), div(wide(2.0f), add(exponential(add(a, a)), wide(1.0f))));
  return where_less(a, wide(0.625f), near_zero, sign_of(far, x));
}

inline Wide error_function(const Wide& x) {
  static constexpr float low_end[] = {1.283791659e-01f, -3.761262714e-01f, 1.128360018e-01f, -2.685444465e-02f, 5.189535450e-03f, -8.020842266e-04f, 7.889122828e-05f};
  static constexpr float high_end[] = {-1.937046044e-04f, 1.129607322e+00f, 6.331565399e-01f, 1.084964830e-01f, -2.526699976e-02f, 4.232360363e-03f, -4.493954734e-04f, 2.299509215e-05f, -9.101866751e-08f};
  const Wide a = absolute(x), s = mul(x, x), capped = min(wide(4.0f), a);
  const Wide near_zero = fma(polynomial(s, low_end, 7), x, x);
  const Wide far = sub(wide(1.0f), exponential(sub(wide(0.0f), polynomial(capped, high_end, 9))));
  return where_less(a, wide(1.0f), near_zero, sign_of(far, x));
}

inline Wide activation(Activation kind, const Wide& x, const Wide& cap) {
  switch (kind) {
    case Activation::Silu: return div(x, add(wide(1.0f), exponential(sub(wide(0.0f), x))));
    case Activation::Gelu: return mul(mul(wide(0.5f), x), add(wide(1.0f), error_function(mul(x, wide(0.70710678118654752f)))));
    case Activation::GeluTanh: {
      const Wide inner = mul(wide(0.79788456080286536f), fma(mul(mul(x, x), wide(0.044715f)), x, x));
      return mul(mul(wide(0.5f), x), add(wide(1.0f), tangent(inner)));
    }
    case Activation::Sigmoid: return sigmoid(x);
    case Activation::Tanh: return tangent(x);
    default: return mul(cap, tangent(div(x, cap)));
  }
}
