// A tensor's elements, by its dtype, for the kernels that take all four of them.
#pragma once

#include "../lstm.h"
#include "storage.cuh"

namespace fused_lstm::cuda {

// How a dtype is stored and calculated with; kFast: results are rounded to 16 bits anyway.
template <Dtype>
struct Element;
template <>
struct Element<kFloat32> : Storage<kF32> {
  using Wide = float;
  static constexpr bool kFast = false;
};
template <>
struct Element<kBFloat16> : Storage<kBf16> {
  using Wide = float;
  static constexpr bool kFast = true;
};
template <>
struct Element<kFloat16> : Storage<kF16> {
  using Wide = float;
  static constexpr bool kFast = true;
};
template <>
struct Element<kFloat64> {
  using Type = double;
  using Wide = double;
  static constexpr bool kFast = false;
  FUSED_LSTM_DEVICE static double load(double value) { return value; }
  FUSED_LSTM_DEVICE static double store(double value) { return value; }
};

// An array of E's, read and written in the type that is calculated in.
template <class E>
struct Reader {
  const typename E::Type* at;

  FUSED_LSTM_DEVICE explicit Reader(const void* data)
      : at(static_cast<const typename E::Type*>(data)) {}
  FUSED_LSTM_DEVICE explicit operator bool() const { return at != nullptr; }
  FUSED_LSTM_DEVICE typename E::Wide operator[](int64_t index) const { return E::load(at[index]); }
};

template <class E>
FUSED_LSTM_DEVICE void write(void* data, int64_t index, typename E::Wide value) {
  static_cast<typename E::Type*>(data)[index] = E::store(value);
}

// run(Element<dtype>())
template <class Run>
const char* with_element(Dtype dtype, Run run) {
  switch (dtype) {
    case kFloat32:
      return run(Element<kFloat32>());
    case kFloat64:
      return run(Element<kFloat64>());
    case kBFloat16:
      return run(Element<kBFloat16>());
    case kFloat16:
      return run(Element<kFloat16>());
    default:
      return "no kernel for this dtype";
  }
}

}  // namespace fused_lstm::cuda
