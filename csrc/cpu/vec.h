// Vectors of the compiler's own kind (GCC and Clang), as wide as the instruction set has them: the
// same source gives SSE, AVX2, AVX-512 and NEON code. Sums are held in Vec<float> or Vec<double>;
// load and store convert from and to the compute dtype, bfloat16 and half being rounded to nearest
// even.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FUSED_LSTM_INLINE static inline __attribute__((always_inline))

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t ubits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// What a compute dtype is summed in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
FUSED_LSTM_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class V, class P>
FUSED_LSTM_INLINE V load_raw(const P* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

FUSED_LSTM_INLINE Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
FUSED_LSTM_INLINE Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
FUSED_LSTM_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
FUSED_LSTM_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }

FUSED_LSTM_INLINE Vec<float> load(const BFloat16* p) {
  using U = VecOf<float>::ubits;
  U wide = __builtin_convertvector(load_raw<VecOf<float>::half>(p), U) << 16;
  return load_raw<Vec<float>>(&wide);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
// Subnormal numbers become zero, as in this set's products.
FUSED_LSTM_INLINE void store(BFloat16* p, Vec<float> v) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &narrow, sizeof narrow);
}
#else
FUSED_LSTM_INLINE void store(BFloat16* p, Vec<float> v) {
  using U = VecOf<float>::ubits;
  U bits = load_raw<U>(&v);
  U rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  U quiet = bits | 0x00400000u;  // rounding must not turn a NaN into an infinity
  rounded = (v == v) ? rounded : quiet;
  auto narrow = __builtin_convertvector(rounded >> 16, VecOf<float>::half);
  memcpy(p, &narrow, sizeof narrow);
}
#endif

#if defined(__AVX512F__)
FUSED_LSTM_INLINE Vec<float> load(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(load_raw<__m256i>(p));
}
FUSED_LSTM_INLINE void store(Half* p, Vec<float> v) {
  __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
#elif defined(__F16C__)
FUSED_LSTM_INLINE Vec<float> load(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(load_raw<__m128i>(p));
}
FUSED_LSTM_INLINE void store(Half* p, Vec<float> v) {
  __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
#else
// Without conversion instructions, through the bits: exact widening, narrowing to nearest even. The
// narrowing lets a float addition do the rounding: 2^e * 1.5 * 2^13 as the addend leaves just a
// half's ten mantissa bits.
FUSED_LSTM_INLINE float widen(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7FFFu) << 13, bits;
  if (magnitude >= 0x0F800000u) {
    bits = magnitude + 0x70000000u;  // infinity and NaN
  } else {
    float scaled;
    memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;  // subnormal halves become normal floats
    memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
FUSED_LSTM_INLINE uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more round to infinity
  if (bits < 0x38800000u) {                        // subnormal half: count units of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // the spacing of floats at 0.5 is 2^-24
    memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3F000000u);
  }
  bits += 0x0FFFu + (bits >> 13 & 1u);
  return sign | uint16_t((bits - 0x38000000u) >> 13);
}
FUSED_LSTM_INLINE Vec<float> load(const Half* p) {
  Vec<float> v{};
  for (int l = 0; l < kLanes<float>; ++l) v[l] = widen(p[l].bits);
  return v;
}
FUSED_LSTM_INLINE void store(Half* p, Vec<float> v) {
  for (int l = 0; l < kLanes<float>; ++l) p[l].bits = narrow(v[l]);
}
#endif

// a b + c. By name where there is such an instruction: the compiler makes one of the expression
// only where both operations are in one basic block, so that bits would depend on the code around
// it.
#if defined(__AVX512F__)
FUSED_LSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FUSED_LSTM_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
FUSED_LSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FUSED_LSTM_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FUSED_LSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FUSED_LSTM_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
FUSED_LSTM_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}
#endif

// The last vector of a row may have fewer elements than lanes: how many a vector at `first` of
// `count` has, and loads and stores that touch only those.
template <class A>
FUSED_LSTM_INLINE int lanes_at(int64_t first, int64_t count) {
  return count - first < kLanes<A> ? int(count - first) : kLanes<A>;
}
template <class T>
FUSED_LSTM_INLINE Vec<Acc<T>> load_part(const T* p, int count) {
  T padded[kLanes<Acc<T>>] = {};
  for (int l = 0; l < count; ++l) padded[l] = p[l];
  return load(padded);
}
template <class T>
FUSED_LSTM_INLINE void store_part(T* p, Vec<Acc<T>> v, int count) {
  T padded[kLanes<Acc<T>>];
  store(padded, v);
  for (int l = 0; l < count; ++l) p[l] = padded[l];
}

template <class T, bool whole>
FUSED_LSTM_INLINE Vec<Acc<T>> load_lanes(const T* p, int count) {
  if (whole || count == kLanes<Acc<T>>) {
    return load(p);
  } else {
    return load_part(p, count);
  }
}
template <bool whole, class T>
FUSED_LSTM_INLINE void store_lanes(T* p, Vec<Acc<T>> v, int count) {
  if (whole || count == kLanes<Acc<T>>) {
    store(p, v);
  } else {
    store_part(p, v, count);
  }
}

// One element, converted: for packing and copying, where speed is not decided.
FUSED_LSTM_INLINE float to_acc(float v) { return v; }
FUSED_LSTM_INLINE double to_acc(double v) { return v; }
FUSED_LSTM_INLINE float to_acc(BFloat16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
#if defined(__F16C__)
FUSED_LSTM_INLINE float to_acc(Half v) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits)));
}
#else
FUSED_LSTM_INLINE float to_acc(Half v) { return widen(v.bits); }
#endif

// From groups of 2 * half lanes of a and b: a's halves added, then b's. Each lane's one summand is
// where it is to be, so that only the other is moved: blends have more ports than shuffles.
template <int half, class V, int... lane>
FUSED_LSTM_INLINE V add_halves(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int count = int(sizeof...(lane));
  const V there = __builtin_shufflevector(a, b, (lane & half ? count + lane : lane)...);
  const V moved =
      __builtin_shufflevector(a, b, (lane & half ? count + lane - half : lane + half)...);
  return there + moved;
}

// Lane l of the result is the sum of the lanes of v[l]; v is used up.
template <class A, int half = kLanes<A> / 2>
FUSED_LSTM_INLINE Vec<A> sum_each(Vec<A>* v) {
  if constexpr (half == 0) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l)
      v[l] = add_halves<half>(v[l], v[l + half], std::make_integer_sequence<int, kLanes<A>>());
    return sum_each<A, half / 2>(v);
  }
}

// Exchanges the blocks of half * half lanes off the diagonal of groups of 2 * half vectors.
template <int half, class V, int... lane>
FUSED_LSTM_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int count = int(sizeof...(lane));
  const V low = __builtin_shufflevector(a, b, (lane & half ? count + lane - half : lane)...);
  b = __builtin_shufflevector(a, b, (lane & half ? count + lane : lane + half)...);
  a = low;
}

// Lane l of v[n] becomes lane n of v[l].
template <class A, int half = kLanes<A> / 2>
FUSED_LSTM_INLINE void transpose(Vec<A>* v) {
  if constexpr (half > 0) {
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<A>; ++l)
      if (!(l & half))
        swap_blocks<half>(v[l], v[l + half], std::make_integer_sequence<int, kLanes<A>>());
    transpose<A, half / 2>(v);
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
