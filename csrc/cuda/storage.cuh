// How each kind of operands is stored, read and published.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace fused_lstm::cuda {

// Type is that of the tensors, Operand the bits that are multiplied (operand() below).
template <Operands kOperands>
struct Storage;

template <>
struct Storage<kBf16> {
  using Type = uint16_t;
  using Operand = uint16_t;
  FUSED_LSTM_DEVICE static float load(uint16_t bits) { return bf16_to_float(bits); }
  FUSED_LSTM_DEVICE static uint16_t store(float value) { return float_to_bf16(value); }
};

template <>
struct Storage<kF16> {
  using Type = uint16_t;
  using Operand = uint16_t;
  FUSED_LSTM_DEVICE static float load(uint16_t bits) { return f16_to_float(bits); }
  FUSED_LSTM_DEVICE static uint16_t store(float value) { return float_to_f16(value); }
};

template <>
struct Storage<kF32> {
  using Type = float;
  using Operand = uint32_t;
  FUSED_LSTM_DEVICE static float load(float value) { return value; }
  FUSED_LSTM_DEVICE static float store(float value) { return value; }
};

template <>
struct Storage<kTf32> : Storage<kF32> {};

// What is in a published word before it is published. No value looks like it: NaNs are published
// as 0x7fff or 0x7fffffff.
constexpr uint32_t kNotYet = 0xffffffffu;

// kNotYet is the largest of all words: three maxima and a comparison, where four comparisons with
// what joins them took twice as long.
FUSED_LSTM_DEVICE bool published(const Words& v) {
  return larger(larger(v.word[0], v.word[1]), larger(v.word[2], v.word[3])) != kNotYet;
}

// The word, or half of a word, in which a value is multiplied by other blocks' weights.
template <Operands kOperands>
FUSED_LSTM_DEVICE uint32_t operand(float value) {
  if constexpr (kOperands == kBf16) return float_to_bf16(value);  // gives 0x7fff for a NaN
  if constexpr (kOperands == kF16) return float_to_f16(value);
  if constexpr (kOperands == kTf32) value = round_tf32(value);
  return value == value ? float_bits(value) : 0x7fffffffu;
}

}  // namespace fused_lstm::cuda
