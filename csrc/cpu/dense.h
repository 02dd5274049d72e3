// Products of a few rows with the weights as they lie, for calls too short to pay for packing: dot
// products along K, MR rows of the operand against a few rows of the weights at a time, summed
// across lanes at the end.
#pragma once

#include "packing.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// One vector along K of a row of weights (T) and of the operand (Elem), and their products' sum.
template <class T, class Elem>
struct AlongK {
  using A = Acc<T>;
  using Weights = Vec<A>;
  static constexpr int kStep = kLanes<A>;
  FUSED_LSTM_INLINE Weights weights(const T* p) { return load(p); }
  FUSED_LSTM_INLINE Weights weights(const T* p, int count) { return load_part(p, count); }
  FUSED_LSTM_INLINE Vec<A> add(Vec<A> sum, Weights w, const Elem* p) { return w * load(p) + sum; }
};

#ifdef FUSED_LSTM_DOT_BF16
template <>
struct AlongK<BFloat16, BFloat16> {
  using Weights = __m512bh;
  static constexpr int kStep = 2 * kLanes<float>;
  FUSED_LSTM_INLINE Weights weights(const BFloat16* p) { return load_raw<__m512bh>(p); }
  FUSED_LSTM_INLINE Weights weights(const BFloat16* p, int count) {
    BFloat16 padded[kStep] = {};
    memcpy(padded, p, size_t(count) * sizeof(BFloat16));
    return weights(padded);
  }
  FUSED_LSTM_INLINE Vec<float> add(Vec<float> sum, Weights w, const BFloat16* p) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, w, load_raw<__m512bh>(p));
  }
};
#endif

// What the sums are taken of and where they go. The operand is zero from K up to whole vectors.
template <class T, class Elem>
struct DenseTile {
  const T* weights;  // `lanes` rows (at most a vector's lanes), `stride` apart
  int64_t stride, K;
  int lanes;
  const Elem* operand;  // MR rows, operand_stride apart
  int64_t operand_stride;
  const Acc<T>* init;  // (MR, lanes), init_stride apart (0: the same row for all)
  int64_t init_stride;
  Acc<T>* out;  // (MR, lanes), kTileWidth apart
};

template <int MR, class T, class Elem>
static __attribute__((noinline)) void dense_tile(const DenseTile<T, Elem>& tile) {
  using Dot = AlongK<T, Elem>;
  using A = Acc<T>;
  constexpr int V = kLanes<A>;
  constexpr int kMost = MR > 3 || kRegisters < 32 ? 4 : 8;  // rows whose sums the registers hold
  constexpr int kAtOnce = V < kMost ? V : kMost;
  const int64_t whole = tile.K / Dot::kStep * Dot::kStep;
  const int rest = int(tile.K - whole);
  Vec<A> total[MR][V] = {};
  for (int l = 0; l < tile.lanes; l += kAtOnce) {
    Vec<A> sum[MR][kAtOnce] = {};
    const T* row[kAtOnce];
    // rows beyond the last one repeat it: their lanes are not stored
    for (int i = 0; i < kAtOnce; ++i)
      row[i] = tile.weights + (l + i < tile.lanes ? l + i : tile.lanes - 1) * tile.stride;
    const auto add = [&](int64_t k, auto... count) __attribute__((always_inline)) {
      typename Dot::Weights w[kAtOnce];
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) w[i] = Dot::weights(row[i] + k, count...);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i)
          sum[r][i] = Dot::add(sum[r][i], w[i], tile.operand + r * tile.operand_stride + k);
    };
    for (int64_t k = 0; k < whole; k += Dot::kStep) add(k);
    if (rest) add(whole, rest);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) total[r][l + i] = sum[r][i];
  }
  for (int r = 0; r < MR; ++r)
    store(tile.out + r * kTileWidth<A>,
          load(tile.init + r * tile.init_stride) + sum_each<A>(total[r]));
}

template <class T, class Elem, int MR = kRowsFor<4>>
FUSED_LSTM_INLINE void dense_tile_of(int rows, const DenseTile<T, Elem>& tile) {
  if (rows == MR) return dense_tile<MR>(tile);
  if constexpr (MR > 1) return dense_tile_of<T, Elem, MR - 1>(rows, tile);
}

// Any number of rows.
template <class T, class Elem>
static void dense_product(int rows, DenseTile<T, Elem> tile) {
  for (int left = rows, m; left > 0; left -= m) {
    m = even_rows(left, kRowsFor<4>);
    dense_tile_of<T, Elem>(m, tile);
    tile.operand += m * tile.operand_stride;
    tile.init += m * tile.init_stride;
    tile.out += m * kTileWidth<Acc<T>>;
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
