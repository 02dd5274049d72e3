// The gradients of gradients.h for calls of a few rows, which are too short to pay for panels and
// strips: dW row by row, each the sum of N multiples of [x | h_{t-1}], straight to where it
// belongs; dx from W_ih's rows as they lie. Threads split the rows of dW and the columns of dx.
#pragma once

#include "table.h"
#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Rows of a whole call up to which this is faster.
constexpr int kFewRows = 8;

// What row b of step t multiplies in dW: x_t and h_{t-1}.
template <class T>
FUSED_LSTM_INLINE const T* input_of(const Gradients& a, int64_t t, int64_t b) {
  return static_cast<const T*>(a.input) + a.seq.offset(t, b, a.input_stride_t, a.input_stride_b);
}
template <class T>
FUSED_LSTM_INLINE const T* hidden_before(const Gradients& a, int64_t t, int64_t b) {
  if (b >= a.seq.continued(t)) return static_cast<const T*>(a.h_0) + b * a.seq.P;
  const int64_t row = a.seq.first_row(a.seq.before(t)) + b;
  return static_cast<const T*>(a.output) + row * a.output_stride;
}

template <class T>
struct FewRowsGradients {
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr int kRowsAtOnce = 4;  // of dx

  const Gradients* args;
  Sequence seq;
  int directions, threads;
  int64_t N;

  // Of each thread: rows of x, h_{t-1} or o tanh(c) to multiply with, and one tile of dx.
  int64_t workspace() const {
    const int64_t widest = seq.I > seq.H ? seq.I : seq.H;
    return (N * round_up(widest, V) + kRowsAtOnce * kWidth) * int64_t(sizeof(A));
  }

  void run(int thread, A* own) const {
    const int64_t G = 4 * seq.H;
    const Range mine = share(G, thread, threads);
    for (int d = 0; d < directions; ++d) {
      const Gradients& a = args[d];
      const T* dgates = static_cast<const T*>(a.dgates);
      if (a.grad_weight_ih && seq.ids) {
        add_to_columns(dgates + mine.begin, G, seq.ids, N, mine.end - mine.begin, seq.I,
                       static_cast<A*>(a.grad_weight_ih) + mine.begin * seq.I);
      } else if (a.grad_weight_ih) {
        fill(seq.I, own, [&](int64_t, int64_t t, int64_t b) { return input_of<T>(a, t, b); });
        outer_products(dgates, G, mine, own, seq.I, a.grad_weight_ih);
      }
      if (a.grad_weight_hh) {
        fill(seq.P, own, [&](int64_t, int64_t t, int64_t b) { return hidden_before<T>(a, t, b); });
        outer_products(dgates, G, mine, own, seq.P, a.grad_weight_hh);
      }
      if (a.grad_weight_hr) {
        fill(seq.H, own, [&](int64_t k, int64_t, int64_t) {
          return static_cast<const T*>(a.hidden) + k * seq.H;
        });
        outer_products(static_cast<const T*>(a.grad_projected), seq.P,
                       share(seq.P, thread, threads), own, seq.H, a.grad_weight_hr);
      }
      if (a.grad_bias) {
        for (int64_t m = mine.begin; m < mine.end; m += V) {
          const int lanes = lanes_at<A>(m, mine.end);
          Vec<A> sum{};
          for (int64_t n = 0; n < N; ++n) sum += load_lanes<T, false>(dgates + n * G + m, lanes);
          store_lanes<false>(static_cast<T*>(a.grad_bias) + m, sum, lanes);
        }
      }
    }
    if (!args[0].grad_input) return;
    const ColumnBlocks blocks(seq.I, V, threads);
    const Range columns = share(blocks.count(), thread, threads);
    for (int64_t block = columns.begin; block < columns.end; ++block)
      for (int64_t n = 0; n < N; n += kRowsAtOnce)
        input_rows<kRowsAtOnce>(n, blocks.first(block), blocks.vectors_of(block), own);
  }

  // `count` elements of each row, from row_at(k, t, b) on, to whole vectors.
  template <class RowAt>
  void fill(int64_t count, A* to, const RowAt& row_at) const {
    int64_t t = 0, b = 0;
    for (int64_t k = 0; k < N; ++k) {
      copy_row(row_at(k, t, b), count, to + k * round_up(count, V), round_up(count, V));
      if (++b == seq.rows(t)) {
        b = 0;
        ++t;
      }
    }
  }

  // The sum over rows n of left[n][m] * right[n], `columns` wide, for the given m of G.
  template <int rows = kFewRows>
  void outer_products(const T* left, int64_t G, const Range& range, const A* right, int64_t columns,
                      void* gradient) const {
    if constexpr (rows > 1)
      if (N < rows) return outer_products<rows - 1>(left, G, range, right, columns, gradient);
    const int64_t stride = round_up(columns, V);
    T* to = static_cast<T*>(gradient) + range.begin * columns;
    for (int64_t m = range.begin; m < range.end; ++m, to += columns) {
      Vec<A> factor[rows];
#pragma GCC unroll 8
      for (int n = 0; n < rows; ++n) factor[n] = splat<A>(to_acc(left[n * G + m]));
      const auto sum_at = [&](int64_t k) {
        Vec<A> sum = factor[0] * load(right + k);
#pragma GCC unroll 8
        for (int n = 1; n < rows; ++n) sum += factor[n] * load(right + n * stride + k);
        return sum;
      };
      // what the last vector writes behind the end of its row is overwritten by the next rows
      const int64_t room = (range.end - m) * columns;
      const int64_t whole = stride <= room ? stride : room / V * V;
      for (int64_t k = 0; k < whole; k += V) store(to + k, sum_at(k));
      for (int64_t k = whole; k < columns; k += V)
        store_lanes<false>(to + k, sum_at(k), int(room - k));
    }
  }

  // dx of row n and those that follow, at most `rows`, `vectors` of it from `column` on. In
  // stretches of K: see product.h.
  template <int rows>
  void input_rows(int64_t n, int64_t column, int vectors, A* sums) const {
    if constexpr (rows > 1)
      if (N - n < rows) return input_rows<rows - 1>(n, column, vectors, sums);
    memset(sums, 0, size_t(rows * kWidth) * sizeof(A));
    for (int d = 0; d < directions; ++d)
      for (int64_t m = 0; m < 4 * seq.H; m += kStretch) {
        const int64_t end = m + kStretch < 4 * seq.H ? m + kStretch : 4 * seq.H;
        if (vectors == 1) add_stretch<rows, 1>(args[d], n, column, m, end, sums);
        if (vectors == 2) add_stretch<rows, 2>(args[d], n, column, m, end, sums);
        if (vectors == 3) add_stretch<rows, 3>(args[d], n, column, m, end, sums);
        if (vectors == 4) add_stretch<rows, 4>(args[d], n, column, m, end, sums);
      }
    T* dx = static_cast<T*>(args[0].grad_input);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) {
        const int64_t k = column + v * V;
        store_lanes<false>(dx + (n + r) * seq.I + k, load(sums + r * kWidth + v * V),
                           lanes_at<A>(k, seq.I));
      }
  }

  template <int rows, int vectors>
  void add_stretch(const Gradients& a, int64_t n, int64_t column, int64_t begin, int64_t end,
                   A* sums) const {
    const T* dgates = static_cast<const T*>(a.dgates) + n * 4 * seq.H;
    const T* w = static_cast<const T*>(a.weight_ih) + column;
    Vec<A> sum[rows][vectors] = {};
    for (int64_t m = begin; m < end; ++m) {
      const T* row = w + m * seq.I;
      // a row's last vector takes in what lies behind it, but for the last rows
      const int lanes = lanes_at<A>(column + (vectors - 1) * V, (4 * seq.H - m) * seq.I);
      Vec<A> weights[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors - 1; ++v) weights[v] = load(row + v * V);
      weights[vectors - 1] = load_lanes<T, false>(row + (vectors - 1) * V, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec<A> factor = splat<A>(to_acc(dgates[r * 4 * seq.H + m]));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] += factor * weights[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        A* to = sums + r * kWidth + v * V;
        store(to, load(to) + sum[r][v]);
      }
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
