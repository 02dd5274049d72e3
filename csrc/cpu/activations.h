// sigmoid and tanh on vectors. Both limits are exact (0, 1, -1) and NaN passes through.
// tests/test_activations.py holds them to 2.5 units in the last place wherever the result is a
// normal number.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) - 1 is a polynomial,
// which keeps tanh's relative error small near zero. float: Cephes' expf polynomial (Moshier,
// 1992); double: the Taylor series to r^13, whose remainder is below 1e-17.
#pragma once

#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// x within [kExpLow, kExpHigh], or NaN
constexpr float kExpLow(float) { return -87.3f; }
constexpr double kExpLow(double) { return -708.3; }
constexpr float kExpHigh(float) { return 88.37f; }
constexpr double kExpHigh(double) { return 709.4; }

// exp(r) = 1 + r + r^2 p(r), highest power first
constexpr float kExpPolynomial(float, int i) {
  constexpr float p[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                         4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  return p[i];
}
constexpr double kExpPolynomial(double, int i) {
  constexpr double p[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                          1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  return p[i];
}

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int terms = 6, mantissa = 23;
  static constexpr int32_t one_bits = 0x3F800000;
};
template <>
struct ExpConstants<double> {
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int terms = 12, mantissa = 52;
  static constexpr int64_t one_bits = 0x3FF0000000000000;
};

#define FUSED_LSTM_EACH(n) _Pragma("GCC unroll 8") for (int n = 0; n < N; ++n)

// scale = 2^k and expm1 = exp(r) - 1 of N vectors. The N chains are written operation by operation,
// each some fifty cycles long: one after another they fill the scheduler and wait (115 cycles a
// cell on Zen 5, 70 so).
template <class A, int N>
FUSED_LSTM_INLINE void exp_parts(const Vec<A>* x, Vec<A>* scale, Vec<A>* expm1) {
  using C = ExpConstants<A>;
  using Bits = typename VecOf<A>::bits;
  Vec<A> shifted[N], r[N], p[N], square[N];
  FUSED_LSTM_EACH(n) shifted[n] = x[n] * A(1.4426950408889634) + splat(C::magic);
  FUSED_LSTM_EACH(n) r[n] = shifted[n] - splat(C::magic);
  FUSED_LSTM_EACH(n) p[n] = x[n] - r[n] * C::ln2_high;
  FUSED_LSTM_EACH(n) r[n] = p[n] - r[n] * C::ln2_low;
  FUSED_LSTM_EACH(n) p[n] = splat(kExpPolynomial(A(), 0));
#pragma GCC unroll 12
  for (int i = 1; i < C::terms; ++i) {
    FUSED_LSTM_EACH(n) p[n] = p[n] * r[n] + kExpPolynomial(A(), i);
  }
  FUSED_LSTM_EACH(n) square[n] = r[n] * r[n];
  FUSED_LSTM_EACH(n) expm1[n] = p[n] * square[n] + r[n];
  FUSED_LSTM_EACH(n) {
    Bits bits = (load_raw<Bits>(&shifted[n]) << C::mantissa) + C::one_bits;
    scale[n] = load_raw<Vec<A>>(&bits);
  }
}

// With e = exp(-2|x|): (1 - e) / (1 + e) from expm1 near zero, 1 - 2e / (1 + e) elsewhere, where
// the quotient's error no longer counts. One division serves both.
template <class A>
FUSED_LSTM_INLINE Vec<A> tanh_argument(Vec<A> x) {
  const Vec<A> low = splat(kExpLow(A()));
  Vec<A> y = x < A(0) ? x + x : A(-2) * x;
  return y < low ? low : y;
}
template <class A>
FUSED_LSTM_INLINE Vec<A> tanh_result(Vec<A> x, Vec<A> scale, Vec<A> parts) {
  const Vec<A> zero{}, one = splat(A(1));
  Vec<A> e = scale * parts + scale;
  Vec<A> expm1 = scale * parts + (scale - one);
  auto near = x * x < splat(A(0.3));
  Vec<A> numerator = near ? expm1 : e + e;
  Vec<A> result = (near ? zero : one) - numerator / (one + e);
  return x < zero ? -result : result;
}

template <class A>
FUSED_LSTM_INLINE Vec<A> sigmoid_argument(Vec<A> x) {
  const Vec<A> low = splat(kExpLow(A())), high = splat(kExpHigh(A()));
  Vec<A> y = x > -low ? low : -x;
  return y > high ? high : y;
}
template <class A>
FUSED_LSTM_INLINE Vec<A> sigmoid_result(Vec<A> x, Vec<A> scale, Vec<A> parts) {
  Vec<A> exp = scale * parts + scale;
  exp = x < splat(-kExpHigh(A())) ? splat(A(__builtin_inf())) : exp;
  return A(1) / (A(1) + exp);
}

// tanh of N vectors, in place.
template <class A, int N>
FUSED_LSTM_INLINE void tanh_each(Vec<A>* x) {
  Vec<A> y[N], scale[N], parts[N];
  FUSED_LSTM_EACH(n) y[n] = tanh_argument<A>(x[n]);
  exp_parts<A, N>(y, scale, parts);
  FUSED_LSTM_EACH(n) x[n] = tanh_result<A>(x[n], scale[n], parts[n]);
}

// The four gates i, f, g, o, in place.
template <class A>
FUSED_LSTM_INLINE void activate_gates(Vec<A>* x) {
  constexpr int N = 4, G = 2;
  Vec<A> y[N], scale[N], parts[N];
  FUSED_LSTM_EACH(n) y[n] = n == G ? tanh_argument<A>(x[n]) : sigmoid_argument<A>(x[n]);
  exp_parts<A, N>(y, scale, parts);
  FUSED_LSTM_EACH(n)
  x[n] = n == G ? tanh_result<A>(x[n], scale[n], parts[n])
                : sigmoid_result<A>(x[n], scale[n], parts[n]);
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
