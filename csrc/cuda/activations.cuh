// The gates' activations. Both kinds reach their limits exactly (0, 1, -1) and pass NaN on.
#pragma once

#include "device.cuh"

namespace fused_lstm::cuda {

// kFast, for results that are rounded to 16 bits: a few units in the last place of float near 1,
// and an absolute error of 1e-7 near 0, by the special function unit. Otherwise as exact as the
// library's exponential.
template <bool kFast>
FUSED_LSTM_DEVICE float sigmoid(float x) {
  if constexpr (kFast) {
    constexpr float kLog2E = 1.44269504088896341f;
    return reciprocal_approximate(1.0f + exp2_approximate(-kLog2E * x));
  } else {
    return 1.0f / (1.0f + exact_exp(-x));
  }
}

// 1 - 2 / (1 + e^2x): no difference of infinities, whatever x is.
template <bool kFast>
FUSED_LSTM_DEVICE float tanh(float x) {
  if constexpr (kFast) {
    constexpr float kTwoLog2E = 2.88539008177792681f;
    return 1.0f - 2.0f * reciprocal_approximate(1.0f + exp2_approximate(kTwoLog2E * x));
  } else {
    return exact_tanh(x);
  }
}

template <bool kFast>
FUSED_LSTM_DEVICE double sigmoid(double x) {
  return 1.0 / (1.0 + exact_exp(-x));
}

template <bool kFast>
FUSED_LSTM_DEVICE double tanh(double x) {
  return exact_tanh(x);
}

}  // namespace fused_lstm::cuda
