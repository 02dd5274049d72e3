// sigmoid and tanh on vectors. Both limits are exact (0, 1, -1) and NaN passes through. tests/test_activations.py
// holds them to 2.5 units in the last place wherever the result is a normal number.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) - 1 is a polynomial, which keeps
// tanh's relative error small near zero. float: Cephes' expf polynomial (Moshier, 1992); double: the Taylor
// series to r^13, whose remainder is below 1e-17.
#pragma once

#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class A>
struct ExpParts {
  Vec<A> scale;  // 2^k
  Vec<A> expm1;  // exp(r) - 1
};

// x within [kExpLow, kExpHigh], or NaN
constexpr float kExpLow(float) { return -87.3f; }
constexpr double kExpLow(double) { return -708.3; }
constexpr float kExpHigh(float) { return 88.37f; }
constexpr double kExpHigh(double) { return 709.4; }

FUSED_LSTM_INLINE ExpParts<float> exp_parts(Vec<float> x) {
  using Bits = VecOf<float>::bits;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  Vec<float> shifted = x * 1.44269504088896341f + magic;
  Vec<float> k = shifted - magic;
  Vec<float> r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  Bits scale = (load_raw<Bits>(&shifted) << 23) + 0x3F800000;
  return {load_raw<Vec<float>>(&scale), p * (r * r) + r};
}

FUSED_LSTM_INLINE ExpParts<double> exp_parts(Vec<double> x) {
  using Bits = VecOf<double>::bits;
  const Vec<double> magic = splat(6755399441055744.0);  // 1.5 * 2^52
  Vec<double> shifted = x * 1.4426950408889634 + magic;
  Vec<double> k = shifted - magic;
  Vec<double> r = x - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  Vec<double> p = splat(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  Bits scale = (load_raw<Bits>(&shifted) << 52) + 0x3FF0000000000000;
  return {load_raw<Vec<double>>(&scale), p * (r * r) + r};
}

template <class A>
FUSED_LSTM_INLINE Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> low = splat(kExpLow(A())), high = splat(kExpHigh(A()));
  Vec<A> y = -x;
  y = y < low ? low : y;
  Vec<A> clamped = y > high ? high : y;
  ExpParts<A> e = exp_parts(clamped);
  Vec<A> exp = e.scale * e.expm1 + e.scale;
  exp = y > high ? splat(A(__builtin_inf())) : exp;
  return A(1) / (A(1) + exp);
}

// With e = exp(-2|x|): (1 - e) / (1 + e) from expm1 near zero, 1 - 2e / (1 + e) elsewhere, where the quotient's
// error no longer counts. One division serves both.
template <class A>
FUSED_LSTM_INLINE Vec<A> tanh(Vec<A> x) {
  const Vec<A> low = splat(kExpLow(A())), zero{}, one = splat(A(1));
  Vec<A> magnitude = x < zero ? -x : x;
  Vec<A> y = A(-2) * magnitude;
  y = y < low ? low : y;
  ExpParts<A> parts = exp_parts(y);
  Vec<A> e = parts.scale * parts.expm1 + parts.scale;
  Vec<A> expm1 = parts.scale * parts.expm1 + (parts.scale - one);
  auto near = magnitude < splat(A(0.55));
  Vec<A> numerator = near ? expm1 : e + e;
  Vec<A> result = (near ? zero : one) - numerator / (one + e);
  return x < zero ? -result : result;
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
