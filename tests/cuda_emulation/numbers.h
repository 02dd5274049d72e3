// The numbers of a GPU in plain C++: conversions as PTX's cvt rounds them, and the approximations
// of the special function unit. Included by emulation.h, in place of device.cuh's own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fused_lstm::cuda {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

inline uint16_t float_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = float_bits(value);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

inline uint16_t float_to_f16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and more
  if (size < 0x38800000)  // below 2^-14: in the sum with 1/2 the last bit is worth 2^-24
    return uint16_t(sign | (float_bits(bits_float(size) + 0.5f) - 0x3f000000));
  const uint32_t shifted = size - (112u << 23);  // the exponent's bias is 15, not 127
  return uint16_t(sign | (shifted + 0xfff + (shifted >> 13 & 1)) >> 13);
}
inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size >= 0x7c00) return bits_float(sign | 0x7f800000 | (size & 0x3ff) << 13);
  if (size < 0x400) return bits_float(sign | float_bits(float(size) * 0x1p-24f));
  return bits_float(sign | ((size << 13) + (112u << 23)));
}

// To 10 bits of fraction, ties away from zero.
inline float round_tf32(float value) {
  if (value != value) return bits_float(0x7fffffff);
  return bits_float((float_bits(value) + 0x1000) & ~0x1fffu);
}

namespace emulation {

inline float flush(float value) {  // .ftz: subnormal numbers are zeros
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

// An approximation may be off: here by one unit in the last place, which way the argument's bits
// say. Limits and ones are exact.
inline float approximate(float argument, float result) {
  if (result == 0 || result == 1 || !std::isfinite(result)) return result;
  return bits_float(float_bits(result) + (float_bits(argument) * 2654435769u >> 31 ? 1 : -1));
}

}  // namespace emulation

inline float exp2_approximate(float x) {
  return emulation::flush(emulation::approximate(x, std::exp2(emulation::flush(x))));
}
inline float reciprocal_approximate(float x) {
  return emulation::flush(emulation::approximate(x, 1.0f / emulation::flush(x)));
}
inline float exact_exp(float x) { return std::exp(x); }
inline float exact_tanh(float x) { return std::tanh(x); }
inline double exact_exp(double x) { return std::exp(x); }
inline double exact_tanh(double x) { return std::tanh(x); }

}  // namespace fused_lstm::cuda
