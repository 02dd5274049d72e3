// Products of a few rows with the weights as they lie, for calls too short to pay for packing: dot
// products along K, MR rows of the operand against a few rows of the weights at a time, summed
// across lanes at the end. A stream, which is to have the same bits, keeps the weights in the order
// in which they are read (pack_rows).
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
  FUSED_LSTM_INLINE Vec<A> add(Vec<A> sum, Weights w, const Elem* p) {
    return multiply_add(w, load(p), sum);
  }
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

// Rows of a whole call up to which packing the weights may cost more than it saves; where K is
// short, as many as it has vectors, for a sum across lanes takes as long as some steps of K.
constexpr int64_t kDenseRows = 64;
template <class T, class Elem>
constexpr bool worth_dense(int64_t rows, int64_t K) {
  return rows <= kDenseRows && rows * AlongK<T, Elem>::kStep <= K;
}

// Rows of an operand and the four gates' rows of weights that they meet. The operand is zero from K
// up to whole vectors.
template <class T, class Elem>
struct DensePart {
  const T* weights;  // of each gate `lanes` rows (at most a vector's lanes), `stride` apart
  int64_t stride;    // without meaning where they are kept
  int64_t gate_stride, K;
  const Elem* operand;  // rows operand_stride apart
  int64_t operand_stride;
};

// The sums and where they go. Of a single step x and h are one operand in two parts: one sum across
// lanes, not two.
template <class T, class Elem>
struct DenseTile {
  int lanes;
  const Acc<T>* init;  // (rows, 4 vectors), init_stride apart (0: the same row for all)
  int64_t init_stride;
  Acc<T>* out;  // (rows, 4 vectors), kTileWidth apart
  int parts;
  DensePart<T, Elem> part[2];
};

// Packs the rows column(0) to column(4V - 1) of the weights, dense and K long, for a tile of four
// gates: a kStep of K of each of a gate's V rows, then the next; zeros from K up to `padded`, and
// for a negative column.
template <class Dot, int V, class T, class Column>
static void pack_rows(const T* weights, int64_t K, int64_t padded, const Column& column, T* to) {
  memset(to, 0, size_t(4 * V * padded) * sizeof(T));
  for (int n = 0; n < 4 * V; ++n) {
    const int64_t c = column(n);
    for (int64_t k = 0; c >= 0 && k < K; k += Dot::kStep)
      memcpy(to + (n / V * padded + k) * V + n % V * Dot::kStep, weights + c * K + k,
             size_t(K - k < Dot::kStep ? K - k : Dot::kStep) * sizeof(T));
  }
}

// Rows [first, first + N) of a gate, a vector of K after the other: as they lie, or kept.
template <class Dot, class T, int N, bool kept>
struct Rows {
  const T* row[kept ? 1 : N];

  Rows(const T* weights, int64_t stride, int lanes, int first) {
    if constexpr (kept) {
      row[0] = weights + first * Dot::kStep;
    } else {
      // rows beyond the last one repeat it: their lanes are not stored
      for (int i = 0; i < N; ++i)
        row[i] = weights + (first + i < lanes ? first + i : lanes - 1) * stride;
    }
  }
  const T* at(int i, int64_t k) const {
    constexpr int64_t lanes = kLanes<Acc<T>>;
    return kept ? row[0] + k * lanes + i * Dot::kStep : row[kept ? 0 : i] + k;
  }
};

// sum[r][i] += row r of the operand with row i of the weights.
template <class Dot, bool kept, int MR, int N, class T, class Elem>
FUSED_LSTM_INLINE void add_products(const DensePart<T, Elem>& part, int gate, int lanes, int first,
                                    Vec<Acc<T>> (*sum)[N]) {
  const Rows<Dot, T, N, kept> rows(part.weights + gate * part.gate_stride, part.stride, lanes,
                                   first);
  const Elem* const operand = part.operand;
  const int64_t stride = part.operand_stride, whole = part.K / Dot::kStep * Dot::kStep;
  const auto add = [&](int64_t k, auto... count) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const typename Dot::Weights w = Dot::weights(rows.at(i, k), count...);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) sum[r][i] = Dot::add(sum[r][i], w, operand + r * stride + k);
    }
  };
  for (int64_t k = 0; k < whole; k += Dot::kStep) add(k);
  if (!kept && whole < part.K) add(whole, int(part.K - whole));
}

// MR rows of the operand. All four gates in one call: a call a gate costs as much as a tenth of the
// sums of H 128.
template <int MR, bool kept, class T, class Elem>
static __attribute__((noinline)) void dense_tile(const DenseTile<T, Elem>& tile) {
  using Dot = AlongK<T, Elem>;
  using A = Acc<T>;
  constexpr int V = kLanes<A>;
  // Rows whose sums the registers hold.
  constexpr int kMost = kept && MR == 1 ? 16 : MR > 3 || kRegisters < 32 ? 4 : 8;
  constexpr int kAtOnce = V < kMost ? V : kMost;
  for (int gate = 0; gate < 4; ++gate) {
    Vec<A> total[MR][V];
#pragma GCC unroll 4
    for (int l = 0; l < V; l += kAtOnce) {
      Vec<A> sum[MR][kAtOnce] = {};
      if (kept || l < tile.lanes)
        for (int p = 0; p < tile.parts; ++p)
          add_products<Dot, kept, MR>(tile.part[p], gate, tile.lanes, l, sum);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < kAtOnce; ++i) total[r][l + i] = sum[r][i];
    }
    for (int r = 0; r < MR; ++r)
      store(tile.out + r * kTileWidth<A> + gate * V,
            load(tile.init + r * tile.init_stride + gate * V) + sum_each<A>(total[r]));
  }
}

template <bool kept, class T, class Elem, int MR = kRowsFor<4>>
FUSED_LSTM_INLINE void dense_tile_of(int rows, const DenseTile<T, Elem>& tile) {
  if (rows == MR) return dense_tile<MR, kept>(tile);
  if constexpr (MR > 1) return dense_tile_of<kept, T, Elem, MR - 1>(rows, tile);
}

// Any number of rows; kept: the weights are as pack_rows leaves them.
template <bool kept, class T, class Elem>
FUSED_LSTM_INLINE void dense_product(int rows, const DenseTile<T, Elem>& tile) {
  if (rows <= kRowsFor<4>) return dense_tile_of<kept, T, Elem>(rows, tile);
  DenseTile<T, Elem> some = tile;
  for (int left = rows, m; left > 0; left -= m) {
    m = even_rows(left, kRowsFor<4>);
    dense_tile_of<kept, T, Elem>(m, some);
    for (DensePart<T, Elem>& part : some.part) part.operand += m * part.operand_stride;
    some.init += m * some.init_stride;
    some.out += m * kTileWidth<Acc<T>>;
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
