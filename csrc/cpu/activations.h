// sigmoid and tanh on vectors. Both limits are exact (0, 1, -1) and NaN passes through. Within 2
// units in the last place in float (1.5 for tanh and 1.9 for sigmoid over every float), 2.5 in
// double, wherever the result is a normal number: tests/test_activations.py.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) - 1 is a polynomial,
// which keeps tanh's relative error small near zero. float: Cephes' expf polynomial (Moshier,
// 1992); double: the Taylor series to r^13, whose remainder is below 1e-17.
#pragma once

#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// The exponential of x in [kExpLow, 0] is a normal number; below it is taken for zero.
constexpr float kExpLow(float) { return -87.6f; }
constexpr double kExpLow(double) { return -708.7; }

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

template <class A>
FUSED_LSTM_INLINE typename VecOf<A>::bits sign_of(Vec<A> x) {
  return (typename VecOf<A>::bits)x & (typename VecOf<A>::bits)splat(A(-0.0));
}
template <class A>
FUSED_LSTM_INLINE Vec<A> minus_absolute(Vec<A> x) {
  return (Vec<A>)((typename VecOf<A>::bits)x | (typename VecOf<A>::bits)splat(A(-0.0)));
}
// exp(x) from its parts: what they hold below kExpLow, or of an infinity, is dropped.
template <class A>
FUSED_LSTM_INLINE Vec<A> exp_of(Vec<A> x, Vec<A> scale, Vec<A> parts) {
  return x < splat(kExpLow(A())) ? Vec<A>{} : scale * parts + scale;
}

// With y = -2|x| and e = exp(y): 1 - 2e / (1 + e) where |x| is not small, for there the quotient's
// error hardly counts. Near zero, float has a polynomial, x + x^3 q(x^2), fitted to |x| <= 0.55 for
// the least relative error (0.02 units in the last place): to beyond where tanh reaches 1/2 and the
// unit doubles. Double has (1 - e) / (1 + e) from expm1.
constexpr float kTanhPolynomial[] = {-6.267388821e-3f, 2.106711698e-2f, -5.385127507e-2f,
                                     1.333257703e-1f, -3.333331732e-1f};

FUSED_LSTM_INLINE Vec<float> tanh_result(Vec<float> x, Vec<float> y, Vec<float> scale,
                                         Vec<float> parts) {
  using Bits = VecOf<float>::bits;
  const Vec<float> one = splat(1.0f), square = x * x, e = exp_of<float>(y, scale, parts);
  const Vec<float> far = one - (e + e) / (one + e);
  Vec<float> q = splat(kTanhPolynomial[0]);
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) q = q * square + kTanhPolynomial[i];
  return square < splat(0.303f) ? q * (square * x) + x
                                : (Vec<float>)((Bits)far | sign_of<float>(x));
}
FUSED_LSTM_INLINE Vec<double> tanh_result(Vec<double> x, Vec<double> y, Vec<double> scale,
                                          Vec<double> parts) {
  using Bits = VecOf<double>::bits;
  const Vec<double> zero{}, one = splat(1.0), e = exp_of<double>(y, scale, parts);
  const auto near = x * x < splat(0.303);
  const Vec<double> upper = near ? scale * parts + (scale - one) : e + e;
  const Vec<double> result = (near ? zero : one) - upper / (one + e);
  return (Vec<double>)((Bits)result | sign_of<double>(x));
}

// With y = -|x| and e = exp(y): 1 / (1 + e) above zero, q = e / (1 + e) below, and e - e q below
// -1, where the error is then little more than e's own.
template <class A>
FUSED_LSTM_INLINE Vec<A> sigmoid_result(Vec<A> x, Vec<A> y, Vec<A> scale, Vec<A> parts) {
  const Vec<A> zero{}, one = splat(A(1)), e = exp_of<A>(y, scale, parts);
  const Vec<A> quotient = (x < zero ? e : one) / (one + e);
  return x < splat(A(-1)) ? e - e * quotient : quotient;
}

// tanh of N vectors, in place.
template <class A, int N>
FUSED_LSTM_INLINE void tanh_each(Vec<A>* x) {
  Vec<A> y[N], scale[N], parts[N];
  FUSED_LSTM_EACH(n) y[n] = A(2) * minus_absolute<A>(x[n]);
  exp_parts<A, N>(y, scale, parts);
  FUSED_LSTM_EACH(n) x[n] = tanh_result(x[n], y[n], scale[n], parts[n]);
}

// The four gates i, f, g, o, in place.
template <class A>
FUSED_LSTM_INLINE void activate_gates(Vec<A>* x) {
  constexpr int N = 4, G = 2;
  Vec<A> y[N], scale[N], parts[N];
  FUSED_LSTM_EACH(n) y[n] = n == G ? A(2) * minus_absolute<A>(x[n]) : minus_absolute<A>(x[n]);
  exp_parts<A, N>(y, scale, parts);
  FUSED_LSTM_EACH(n)
  x[n] = n == G ? tanh_result(x[n], y[n], scale[n], parts[n])
                : sigmoid_result<A>(x[n], y[n], scale[n], parts[n]);
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
