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

// 16 pairs of 16-bit numbers, one a column, from two rows `stride` apart: `there` rows and
// `columns` of them exist, the rest are zeros.
template <class T>
FUSED_LSTM_INLINE Vec<float> pairs_of(const T* rows, int64_t stride, int64_t there,
                                      int64_t columns) {
  static_assert(sizeof(T) == 2, "pairs of 16-bit numbers");
  using Half = VecOf<float>::half;
  constexpr int V = kLanes<float>;
  Half row[2] = {};
  for (int i = 0; i < 2; ++i) {
    if (there <= i) break;
    if (columns >= V) {
      row[i] = load_raw<Half>(rows + i * stride);
    } else if (columns > 0) {
      memcpy(&row[i], rows + i * stride, size_t(columns) * sizeof(T));
    }
  }
  using Pairs = VecOf<float>::ubits;
  return (Vec<float>)(__builtin_convertvector(row[0], Pairs) |
                      __builtin_convertvector(row[1], Pairs) << 16);
}

// One step of K (`there` rows of at most kStepK exist) of one vector of columns.
template <class Gemm, class T>
FUSED_LSTM_INLINE void pack_vector(const T* rows, int64_t stride, int64_t there, int64_t columns,
                                   typename Gemm::Elem* to) {
  if constexpr (Gemm::kStepK == 2) {
    const Vec<float> pairs = pairs_of(rows, stride, there, columns);
    memcpy(to, &pairs, sizeof pairs);
  } else if (there > 0 && columns >= kLanes<typename Gemm::A>) {
    store(to, load(rows));
  } else {
    store(to, load_part(rows, there > 0 && columns > 0 ? int(columns) : 0));
  }
}

// Packs a panel of `width` columns (whole vectors) whose elements are dense along K: column n is
// weights + column(n) * stride, or zeros where column(n) is negative. A vector of each of a
// vector's columns is transposed in registers at a time; what is transposed is one step of K, a
// number or a pair of 16-bit numbers. So many rows that are far from each other are more than the
// processor fetches ahead by itself: H 1150 in float at 2.9, fetched here at 6.5 GB/s. to_at(step,
// v): where a vector goes.
template <class Gemm, class T, class Column, class ToAt>
static void transpose_columns(const T* weights, int64_t stride, int64_t K, int width,
                              const Column& column, const ToAt& to_at) {
  using A = typename Gemm::A;
  constexpr int S = Gemm::kStepK, V = kLanes<A>;
  constexpr int64_t kAhead = 256 / sizeof(T);
  const bool far = S == 1 && K * int64_t(sizeof(T)) > 2048;
  const int64_t steps = round_up(K, Gemm::kPadK) / S;
  for (int64_t k = 0; k < steps; k += V)
    for (int n = 0; n < width; n += V) {
      Vec<A> v[V];
      const int64_t left = K - k * S;
      for (int l = 0; l < V; ++l) {
        const int64_t c = column(n + l);
        const T* from = weights + c * stride + k * S;
        if (far && left > kAhead) __builtin_prefetch(from + kAhead);
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
      typename Gemm::Panel* to = to_at(k, n / V);
      const int64_t apart = to_at(k + 1, n / V) - to;
      for (int64_t i = 0; i < V && k + i < steps; ++i, to += apart) {
        if constexpr (S == 1) {
          store(to, v[i]);
        } else {
          memcpy(to, &v[i], sizeof(v[i]));
        }
      }
    }
}

template <class Gemm, class T, class Column>
static void pack_dense_k(const T* weights, int64_t stride, int64_t K, int width,
                         const Column& column, typename Gemm::Panel* panel) {
  const int vectors = width / kLanes<typename Gemm::A>;
  const int64_t steps = round_up(K, Gemm::kPadK) / Gemm::kStepK;
  transpose_columns<Gemm>(weights, stride, K, width, column, [&](int64_t step, int v) {
    return panel + Gemm::panel_at(step, v, vectors, steps);
  });
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

// A panel of K rows and so many vectors, of which `columns` columns exist.
template <class Gemm>
struct PanelOf {
  typename Gemm::Elem* panel;
  int64_t K;
  int vectors;
  int64_t columns;

  int64_t steps() const { return round_up(K, Gemm::kPadK) / Gemm::kStepK; }
  typename Gemm::Elem* at(int64_t step, int v) const {
    return panel + Gemm::panel_at(step, v, vectors, steps());
  }
};

// Packs rows k to `end` of such a panel, or all, from rows of K `stride` apart; `weights` is row 0.
// How many vectors there are is known to the compiler: where each goes takes as long to find out as
// to copy it.
template <class Gemm, int vectors = kMaxVectors, class T>
static void pack_dense_columns(const T* weights, int64_t stride, const PanelOf<Gemm>& to, int64_t k,
                               int64_t end) {
  if constexpr (vectors > 1)
    if (to.vectors < vectors)
      return pack_dense_columns<Gemm, vectors - 1>(weights, stride, to, k, end);
  constexpr int S = Gemm::kStepK, V = kLanes<typename Gemm::A>;
  const int64_t steps = to.steps();
  for (end = round_up(end, Gemm::kPadK); k < end; k += S)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      pack_vector<Gemm>(weights + k * stride + v * V, stride, to.K - k, to.columns - v * V,
                        to.panel + Gemm::panel_at(k / S, v, vectors, steps));
}
template <class Gemm, class T>
static void pack_dense_columns(const T* weights, int64_t stride, const PanelOf<Gemm>& to) {
  pack_dense_columns(weights, stride, to, 0, to.K);
}

// Packs kPadK rows of K, `stride` apart, as so many strips `strip_size` apart: kPadK of a strip's
// steps of K. `step` holds a step of all strips.
template <class Gemm>
static void pack_strips(const typename Gemm::Elem* rows, int64_t stride, int64_t strips,
                        int64_t strip_size, typename Gemm::Elem* step, typename Gemm::Elem* to) {
  constexpr int S = Gemm::kStepK, R = Gemm::kStripRows, V = kLanes<typename Gemm::A>;
  constexpr size_t kBytes = sizeof(typename Gemm::Elem);
  if constexpr (Gemm::kStripIsTransposed) {
    static_assert(S == 2 && Gemm::kPadK == 2 * V && R % V == 0, "whole squares of pairs");
    for (int64_t c = 0; c < strips * R; c += V) {
      Vec<float> v[V];
      for (int l = 0; l < V; ++l) v[l] = pairs_of(rows + 2 * l * stride + c, stride, 2, V);
      transpose<float>(v);
      memcpy(to + c / R * strip_size + c % R * Gemm::kPadK, v, sizeof(v));
    }
  } else {
    static_assert(S == Gemm::kPadK, "one step");
    const typename Gemm::Elem* packed = rows;
    if constexpr (S > 1) {
      for (int64_t c = 0; c < strips * R; c += V)
        pack_vector<Gemm>(rows + c, stride, S, V, step + c * S);
      packed = step;
    }
    for (int64_t s = 0; s < strips; ++s)
      memcpy(to + s * strip_size, packed + s * R * S, kBytes * R * S);
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
