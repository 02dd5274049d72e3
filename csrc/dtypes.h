// The compute dtypes as torch has them.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "lstm.h"

namespace fused_lstm {

// In the order of Dtype.
inline constexpr at::ScalarType kScalarTypes[kDtypes] = {at::kFloat, at::kDouble, at::kBFloat16,
                                                         at::kHalf};

inline std::optional<Dtype> dtype_of(at::ScalarType type) {
  for (int index = 0; index < kDtypes; ++index)
    if (kScalarTypes[index] == type) return Dtype(index);
  return std::nullopt;
}

// Of sums, in the kernels: float32 for 16 bits.
inline at::ScalarType sums_of(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

}  // namespace fused_lstm
