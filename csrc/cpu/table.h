// A one-hot input given by ids, as tables: x W_ih^T + b is an id's row of W_ih's panel, the biases
// added, and dW_ih^T has in an id's row the sum of the rows of dgates that it came with. W_ih and
// its gradient are in the type of sums, A: what an embedding has been multiplied with is not
// rounded to 16 bits.
#pragma once

#include "packing.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Of a block of units: W_ih (4H, I) and its biases (4V) to `table` (I, 4V).
template <class A, class Column>
static void pack_table(const A* weight_ih, int64_t I, const Column& column, const A* bias,
                       A* table) {
  constexpr int kWidth = kTileWidth<A>;
  transpose_columns<typename ProductOf<A>::type>(
      weight_ih, I, I, kWidth, column,
      [&](int64_t id, int v) { return table + id * kWidth + v * kLanes<A>; });
  for (int64_t id = 0; id < I; ++id, table += kWidth)
    for (int n = 0; n < kWidth; ++n) table[n] += bias[n];
}

// The rows of so many ids.
template <class A>
static void take_rows(const A* table, const int64_t* ids, int64_t count, A* rows) {
  constexpr int kWidth = kTileWidth<A>;
  for (int64_t i = 0; i < count; ++i)
    memcpy(rows + i * kWidth, table + ids[i] * kWidth, kWidth * sizeof(A));
}

// The same without a table: from W_ih as it lies.
template <class A, class Column>
static void take_columns(const A* weight_ih, int64_t I, const Column& column, const A* bias,
                         const int64_t* ids, int64_t count, A* rows) {
  constexpr int kWidth = kTileWidth<A>;
  for (int64_t i = 0; i < count; ++i, rows += kWidth)
    for (int n = 0; n < kWidth; ++n) {
      const int64_t c = column(n);
      rows[n] = c < 0 ? A(0) : weight_ih[c * I + ids[i]] + bias[n];
    }
}

// Each of so many rows, `vectors` wide, on top of its id's (kTileWidth); at(i, v): of row i, vector
// v.
template <class A, class At>
static void add_rows_to_table(const At& at, int vectors, const int64_t* ids, int64_t count,
                              A* table) {
  constexpr int V = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    A* row = table + ids[i] * kTileWidth<A>;
    for (int v = 0; v < vectors; ++v) store(row + v * V, load(row + v * V) + at(i, v));
  }
}

// dW_ih (of so many of its rows, I wide) of `count` ids, from dgates, rows G apart: without a table.
template <class T>
static void add_to_columns(const T* dgates, int64_t G, const int64_t* ids, int64_t count,
                           int64_t rows, int64_t I, Acc<T>* gradient) {
  memset(gradient, 0, size_t(rows * I) * sizeof(Acc<T>));
  for (int64_t m = 0; m < rows; ++m, gradient += I)
    for (int64_t n = 0; n < count; ++n) gradient[ids[n]] += to_acc(dgates[n * G + m]);
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
