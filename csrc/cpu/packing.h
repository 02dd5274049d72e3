// Operands and panels in the order in which product.h reads them.
#pragma once

#include "product.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Copies one row into the product's type, zero-filled up to padded elements.
template <class T, class Elem>
FUSED_LSTM_INLINE void copy_row(const T* from, int64_t count, Elem* to, int64_t padded) {
  if constexpr (sizeof(T) == sizeof(Elem)) {
    memcpy(to, from, size_t(count) * sizeof(T));
  } else {
    constexpr int V = kLanes<Elem>;
    int64_t k = 0;
    for (; k + V <= count; k += V) store(to + k, load(from + k));
    for (; k < count; ++k) to[k] = to_acc(from[k]);
  }
  if (padded > count) memset(to + count, 0, size_t(padded - count) * sizeof(Elem));
}

// One step of K: `there` (at most kStepK) rows `stride` apart, interleaved, `count` elements each,
// the rest of `width` zeros. Writes width * kStepK elements.
template <class Gemm, class T>
FUSED_LSTM_INLINE void interleave(const T* rows, int64_t stride, int there, int64_t count,
                                  typename Gemm::Elem* to, int64_t width) {
  if constexpr (Gemm::kStepK == 1) {
    copy_row(rows, there ? count : 0, to, width);
  } else {
    static_assert(Gemm::kStepK == 2 && sizeof(T) == 2, "pairs of 16-bit numbers");
    const uint16_t* low = reinterpret_cast<const uint16_t*>(rows);
    const uint16_t* high = low + stride;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    if (there == 2) {
      for (int64_t n = 0; n < count; ++n) pairs[n] = low[n] | uint32_t(high[n]) << 16;
    } else {
      for (int64_t n = 0; n < count; ++n) pairs[n] = there ? low[n] : 0;
    }
    memset(pairs + count, 0, size_t(width - count) * sizeof(uint32_t));
  }
}

// Packs a panel of `width` columns (whole vectors) whose elements are dense along K: column n is
// weights + column(n) * stride, or zeros where column(n) is negative. A vector of each of a
// vector's columns is transposed in registers at a time; what is transposed is one step of K, a
// number or a pair of 16-bit numbers.
template <class Gemm, class T, class Column>
static void pack_dense_k(const T* weights, int64_t stride, int64_t K, int width, Column column,
                         typename Gemm::Panel* panel) {
  using A = typename Gemm::A;
  constexpr int S = Gemm::kStepK, V = kLanes<A>;
  const int64_t steps = round_up(K, Gemm::kPadK) / S;
  for (int64_t k = 0; k < steps; k += V)
    for (int n = 0; n < width; n += V) {
      Vec<A> v[V];
      const int64_t left = K - k * S;
      for (int l = 0; l < V; ++l) {
        const int64_t c = column(n + l);
        const T* from = weights + c * stride + k * S;
        if (c < 0 || left <= 0) {
          v[l] = Vec<A>{};
        } else if constexpr (S == 1) {
          v[l] = left >= V ? load(from) : load_part(from, int(left));
        } else {
          T some[V * S] = {};
          if (left < V * S) memcpy(some, from, size_t(left) * sizeof(T));
          v[l] = load_raw<Vec<A>>(left < V * S ? some : from);
        }
      }
      transpose<A>(v);
      for (int64_t i = 0; i < V && k + i < steps; ++i) {
        typename Gemm::Panel* to = panel + ((k + i) * width + n) * S;
        if constexpr (S == 1) {
          store(to, v[i]);
        } else {
          memcpy(to, &v[i], sizeof(v[i]));
        }
      }
    }
}

// Of a block of V units from `first` on, which row of the 4H gates column n is: the units' gates i,
// then f, g, o; -1 beyond H.
template <int V>
FUSED_LSTM_INLINE auto gate_column(int64_t first, int64_t H) {
  return [=](int n) { return first + n % V < H ? n / V * H + first + n % V : int64_t(-1); };
}

// b_ih + b_hh of the columns of such a block; zero where there is none.
template <class T, class Column>
static void add_biases(const void* bias_ih, const void* bias_hh, Column column, Acc<T>* sums) {
  for (int n = 0; n < 4 * kLanes<Acc<T>>; ++n) {
    const int64_t c = column(n);
    sums[n] = 0;
    if (c >= 0 && bias_ih) sums[n] += to_acc(static_cast<const T*>(bias_ih)[c]);
    if (c >= 0 && bias_hh) sums[n] += to_acc(static_cast<const T*>(bias_hh)[c]);
  }
}

// Packs a panel of `width` columns, `columns` of them there and the rest zeros, from rows of K
// `stride` apart.
template <class Gemm, class T>
static void pack_dense_columns(const T* weights, int64_t stride, int64_t K, int64_t width,
                               int64_t columns, typename Gemm::Elem* panel) {
  constexpr int S = Gemm::kStepK;
  if (columns > width) columns = width;
  for (int64_t k = 0; k < round_up(K, Gemm::kPadK); k += S, panel += width * S) {
    const int64_t left = K - k;
    const int there = left >= S ? S : left > 0 ? int(left) : 0;
    interleave<Gemm>(weights + k * stride, stride, there, columns, panel, width);
  }
}

// 16 columns from 16 pairs of rows `stride` apart, `there` rows of them, to columns `padded` apart,
// each a line of 32 numbers: the pairs are transposed in registers.
template <class Elem>
FUSED_LSTM_INLINE void transpose_pairs(const Elem* rows, int64_t stride, int64_t there,
                                       int64_t columns, Elem* to, int64_t padded) {
  using Pairs = VecOf<float>::ubits;
  constexpr int V = kLanes<float>;
  const auto row = [&](int64_t k) __attribute__((always_inline)) {
    VecOf<float>::half numbers{};
    if (k < there) {
      if (columns >= V) {
        numbers = load_raw<VecOf<float>::half>(rows + k * stride);
      } else if (columns > 0) {
        memcpy(&numbers, rows + k * stride, size_t(columns) * sizeof(Elem));
      }
    }
    return __builtin_convertvector(numbers, Pairs);
  };
  Vec<float> v[V];
  for (int l = 0; l < V; ++l) v[l] = (Vec<float>)(row(2 * l) | row(2 * l + 1) << 16);
  transpose<float>(v);
  for (int l = 0; l < V; ++l) memcpy(to + l * padded, &v[l], sizeof(v[l]));
}

// Packs `columns` columns of a dense matrix, rows of K `stride` apart, as strips `strip_size`
// apart. One step of K at a time for all strips: column by column, the matrix's rows (4 KB and more
// apart) evict one another from the first-level cache. `step` holds one step of all strips.
template <class Gemm, class T>
static void pack_strips(const T* from, int64_t stride, int64_t K, int64_t columns,
                        typename Gemm::Elem* strips, int64_t strip_size,
                        typename Gemm::Elem* step) {
  constexpr int S = Gemm::kStepK, R = Gemm::kStripRows;
  const int64_t padded = round_up(K, Gemm::kPadK), count = (columns + R - 1) / R;
  if constexpr (Gemm::kStripIsTransposed) {
    constexpr int V = kLanes<float>;
    static_assert(S == 2 && Gemm::kPadK == 2 * V && R % V == 0, "whole squares of pairs");
    for (int64_t k = 0; k < padded; k += 2 * V)
      for (int64_t c = 0; c < count * R; c += V)
        transpose_pairs(from + k * stride + c, stride, K - k, columns - c,
                        strips + c / R * strip_size + c % R * padded + k, padded);
  } else {
    for (int64_t k = 0; k < padded; k += S) {
      const int64_t left = K - k;
      interleave<Gemm>(from + k * stride, stride, left >= S ? S : int(left), columns, step,
                       count * R);
      for (int64_t s = 0; s < count; ++s)
        memcpy(strips + s * strip_size + k * R, step + s * R * S,
               sizeof(typename Gemm::Elem) * R * S);
    }
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
