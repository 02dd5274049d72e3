// Products with weights that are kept narrower than they are computed with, in panels of
// product.h's order: 16-bit numbers widened in the product, and 8-bit integers with a scale a row.
//
// Integers meet an operand that is quantised on the fly to 16 bits, whose error is a hundredth of
// the weights' own: with AVX-512 VNNI, whose products are of bytes, a high and a low byte (64
// weights in two instructions); with AVX2 and AVX-512 as 16-bit pairs; elsewhere it stays float.
// Sums of integers are exact.
#pragma once

#include "packing.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class Stored>
struct MultiplyWidened : Multiply<float, float> {
  using Panel = Stored;
  FUSED_LSTM_INLINE Vec<float> column(const Stored* p) { return load(p); }
};

// Pairs along K: in a 32-bit number the upper half is one, and after a shift the lower half the
// other, so that widening is one instruction a vector.
template <>
struct MultiplyWidened<BFloat16> {
  using Elem = float;
  using Panel = BFloat16;
  using Acc = float;
  static constexpr int kStepK = 2, kPadK = 2;
  static constexpr int64_t kSteps = kStretch / 2;  // as many of K as where they are widened before
  struct Pair {
    Vec<float> even, odd;
  };
  using Column = Pair;
  using Row = Pair;
  FUSED_LSTM_INLINE Pair column(const BFloat16* p) {
    using U = VecOf<float>::ubits;
    const U pairs = load_raw<U>(p), even = pairs << 16, odd = pairs & 0xFFFF0000u;
    return {(Vec<float>)even, (Vec<float>)odd};
  }
  FUSED_LSTM_INLINE Pair row(const float* p) { return {splat(p[0]), splat(p[1])}; }
  FUSED_LSTM_INLINE Vec<float> add(Vec<float> sum, Pair a, Pair b) {
    return multiply_add(a.odd, b.odd, multiply_add(a.even, b.even, sum));
  }
};

// --- 8-bit integers ------------------------------------------------------------------------------

// A row of the operand: this, then what the product reads.
struct alignas(64) Quantised {
  float scale;
  int32_t start[2];  // what the sums begin with
};

using Integers = VecOf<float>::bits;

// To the nearest integer, ties to even: the sum's low bits are the integer.
FUSED_LSTM_INLINE Integers nearest(Vec<float> x) {
  const Vec<float> shifted = x + splat(12582912.0f);  // 1.5 * 2^23
  return load_raw<Integers>(&shifted) - 0x4B400000;
}

#if defined(__AVX512VNNI__) && defined(__AVX512F__)

// x = 256 high + low, signed bytes both. The instruction wants the other operand unsigned: weights
// are kept as w + 128, and the sums start at -128 times the sum of the operand's bytes.
struct MultiplyBytes {
  static constexpr int kStepK = 4, kRows = 3, kBytes = 2;
  static constexpr int64_t kSteps = INT64_MAX;
  static constexpr float kMost = 127 * 256 + 127;
  struct Pair {
    __m512i high, low;
  };
  using Sum = Integers;  // two for a column, of the high bytes and of the low ones
  static constexpr int kSums = 2;
  using Row = Pair;
  using Column = __m512i;

  struct Sums {
    Integers high{}, low{};
  };
  FUSED_LSTM_INLINE void put(Vec<float> x, char* to, Sums& sums) {
    const Integers q = nearest(x), low = (q << 24) >> 24, high = (q - low) >> 8;
    sums.low += low;
    sums.high += high;
    const __m128i l = _mm512_cvtepi32_epi8((__m512i)low), h = _mm512_cvtepi32_epi8((__m512i)high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + 1, _mm_unpackhi_epi32(h, l));
  }
  FUSED_LSTM_INLINE void finish(const Sums& sums, Quantised& row) {
    row.start[0] = -128 * _mm512_reduce_add_epi32((__m512i)sums.high);
    row.start[1] = -128 * _mm512_reduce_add_epi32((__m512i)sums.low);
  }
  FUSED_LSTM_INLINE int8_t kept(int weight) { return int8_t(uint8_t(weight + 128)); }

  FUSED_LSTM_INLINE Column column(const int8_t* p) { return load_raw<__m512i>(p); }
  FUSED_LSTM_INLINE Row row(const char* p) {
    int32_t high, low;
    memcpy(&high, p, 4);
    memcpy(&low, p + 4, 4);
    return {_mm512_set1_epi32(high), _mm512_set1_epi32(low)};
  }
  FUSED_LSTM_INLINE void start(Sum* sum, const Quantised& row) {
    sum[0] = Integers{} + row.start[0];
    sum[1] = Integers{} + row.start[1];
  }
  FUSED_LSTM_INLINE void add(Sum* sum, Row a, Column b) {
    sum[0] = (Integers)_mm512_dpbusd_epi32((__m512i)sum[0], b, a.high);
    sum[1] = (Integers)_mm512_dpbusd_epi32((__m512i)sum[1], b, a.low);
  }
  FUSED_LSTM_INLINE Vec<float> value(const Sum* sum) {
    return __builtin_convertvector(sum[0], Vec<float>) * 256.0f +
           __builtin_convertvector(sum[1], Vec<float>);
  }
};

#elif defined(__AVX2__)

// Pairs of 16 bits, whose sums are taken out before they could overflow.
struct MultiplyBytes {
  static constexpr int kStepK = 2, kRows = kRegisters == 32 ? 6 : 2, kBytes = 2;
  static constexpr int64_t kSteps = 128;
  static constexpr float kMost = 32767;
  struct Sums {};
  FUSED_LSTM_INLINE void put(Vec<float> x, char* to, Sums&) {
    typedef int16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    const auto q = __builtin_convertvector(nearest(x), Narrow);
    memcpy(to, &q, sizeof q);
  }
  FUSED_LSTM_INLINE void finish(const Sums&, Quantised&) {}
  FUSED_LSTM_INLINE int8_t kept(int weight) { return int8_t(weight); }

#if defined(__AVX512BW__)
  using Sum = __m512i;
  FUSED_LSTM_INLINE Sum column(const int8_t* p) {
    return _mm512_cvtepi8_epi16(load_raw<__m256i>(p));
  }
  FUSED_LSTM_INLINE void add(Sum* sum, Sum a, Sum b) {
    *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(a, b));
  }
#else
  using Sum = __m256i;
  FUSED_LSTM_INLINE Sum column(const int8_t* p) {
    return _mm256_cvtepi8_epi16(load_raw<__m128i>(p));
  }
  FUSED_LSTM_INLINE void add(Sum* sum, Sum a, Sum b) {
    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(a, b));
  }
#endif
  using Row = Sum;
  using Column = Sum;
  FUSED_LSTM_INLINE Row row(const char* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return (Row)(Integers{} + pair);
  }
  static constexpr int kSums = 1;
  FUSED_LSTM_INLINE void start(Sum* sum, const Quantised&) { *sum = Sum{}; }
  FUSED_LSTM_INLINE Vec<float> value(const Sum* sum) {
    return __builtin_convertvector((Integers)*sum, Vec<float>);
  }
};

#else

struct MultiplyBytes {
  static constexpr int kStepK = 1, kRows = 2, kBytes = 4;
  static constexpr int64_t kSteps = 64;
  static constexpr float kMost = 0;  // the operand is not quantised
  struct Sums {};
  FUSED_LSTM_INLINE void put(Vec<float> x, char* to, Sums&) { memcpy(to, &x, sizeof x); }
  FUSED_LSTM_INLINE void finish(const Sums&, Quantised&) {}
  FUSED_LSTM_INLINE int8_t kept(int weight) { return int8_t(weight); }

  using Sum = Vec<float>;
  using Row = Sum;
  using Column = Sum;
  FUSED_LSTM_INLINE Column column(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
    return __builtin_convertvector(load_raw<Bytes>(p), Vec<float>);
  }
  FUSED_LSTM_INLINE Row row(const char* p) {
    float x;
    memcpy(&x, p, 4);
    return splat(x);
  }
  static constexpr int kSums = 1;
  FUSED_LSTM_INLINE void start(Sum* sum, const Quantised&) { *sum = Sum{}; }
  FUSED_LSTM_INLINE void add(Sum* sum, Row a, Column b) { *sum = multiply_add(a, b, *sum); }
  FUSED_LSTM_INLINE Vec<float> value(const Sum* sum) { return *sum; }
};

#endif

// What a tile of 8-bit weights is computed from; the panel as product.h's, four vectors wide.
struct BytesTile {
  const char* operand;  // Quantised rows, `stride` bytes apart
  int64_t stride;
  const int8_t* panel;
  int64_t steps;
  const float* scales;  // of the columns
  const float* init;    // as Tile's
  int64_t init_stride;
  float* out;
};

// The product of quantised rows with 8-bit panels, in Product's place.
struct ProductBytes {
  using Dot = MultiplyBytes;
  using Elem = float;
  using Panel = int8_t;
  using A = float;
  static constexpr int kStepK = Dot::kStepK, kPadK = 16, V = kLanes<float>, NV = kMaxVectors;

  static int next_rows(int64_t left, int) { return even_rows(left, Dot::kRows); }
  static void end() {}

  static int64_t row_bytes(int64_t padded) {
    return round_up(int64_t(sizeof(Quantised)) + padded * Dot::kBytes, 64);
  }

  // row: `padded` numbers, zeros from the operand's end on.
  static __attribute__((noinline)) void quantise(const float* row, int64_t padded, char* to) {
    Quantised header{1, {0, 0}};
    float inverse = 1;
    if (Dot::kMost > 0) {
      Vec<float> most{}, finite{};
      for (int64_t k = 0; k < padded; k += V) {
        const Vec<float> x = load(row + k), size = x < Vec<float>{} ? -x : x;
        most = size > most ? size : most;
        finite += x * 0.0f;
      }
      float largest = 0;
      for (int l = 0; l < V; ++l) {
        largest = most[l] > largest ? most[l] : largest;
        header.scale += finite[l];  // NaN, for all sums of a row that has an infinity or a NaN
      }
      header.scale *= largest / Dot::kMost;
      inverse = largest > 1e-30f ? Dot::kMost / largest : 0;
    }
    typename Dot::Sums sums;
    for (int64_t k = 0; k < padded; k += V)
      Dot::put(load(row + k) * inverse, to + sizeof(Quantised) + k * Dot::kBytes, sums);
    Dot::finish(sums, header);
    memcpy(to, &header, sizeof header);
  }

  template <int MR>
  static __attribute__((noinline)) void tile(const BytesTile& tile) {
    constexpr int64_t kStepBytes = kStepK * Dot::kBytes;
    const char* operand = tile.operand + sizeof(Quantised);
    const int8_t* panel = tile.panel;
    const float* before = tile.init;
    int64_t before_stride = tile.init_stride, left = tile.steps;
    const auto header = [&](int r) {
      return reinterpret_cast<const Quantised*>(tile.operand + r * tile.stride);
    };
    do {
      // GCC 12 keeps the sums in memory, at half the speed, where they are structs of two, of another
      // type than the instruction's, or a loop over them is not unrolled.
      typename Dot::Sum sum[MR][NV][Dot::kSums];
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) Dot::start(sum[r][v], *header(r));
      for (int64_t k = left < Dot::kSteps ? left : Dot::kSteps; k > 0; --k) {
        typename Dot::Column b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) b[v] = Dot::column(panel + v * V * kStepK);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const typename Dot::Row a = Dot::row(operand + r * tile.stride);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) Dot::add(sum[r][v], a, b[v]);
        }
        operand += kStepBytes;
        panel += NV * V * kStepK;
      }
      left -= Dot::kSteps;
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          store(tile.out + r * kTileWidth<A> + v * V,
                load(before + r * before_stride + v * V) +
                    Dot::value(sum[r][v]) * (load(tile.scales + v * V) * header(r)->scale));
      before = tile.out;
      before_stride = kTileWidth<A>;
    } while (left > 0);
  }

  template <int MR = Dot::kRows>
  static void run(int rows, const BytesTile& t) {
    if (rows == MR) return tile<MR>(t);
    if constexpr (MR > 1) return run<MR - 1>(rows, t);
  }

  // Packs a panel of four vectors of columns as pack_dense_k does, and each column's scale.
  template <class Column>
  static __attribute__((noinline)) void pack(const float* weights, int64_t K, Column column,
                                             int8_t* panel, float* scales) {
    constexpr int width = NV * V;
    const int64_t steps = round_up(K, kPadK) / kStepK;
    for (int n = 0; n < width; ++n) {
      const int64_t c = column(n);
      const float* row = weights + c * K;
      float largest = 0;
      for (int64_t k = 0; c >= 0 && k < K; ++k) {
        const float size = row[k] < 0 ? -row[k] : row[k];
        largest = size > largest ? size : largest;
      }
      scales[n] = largest / 127;
      for (int64_t k = 0; k < steps * kStepK; ++k) {
        const float x = c >= 0 && k < K && largest > 0 ? row[k] / scales[n] : 0;
        panel[(k / kStepK * width + n) * kStepK + k % kStepK] = Dot::kept(nearest(splat(x))[0]);
      }
    }
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
