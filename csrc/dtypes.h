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

}  // namespace fused_lstm
