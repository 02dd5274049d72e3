// A one-hot input given by ids, as tables: x W_ih^T + b is an id's row of W_ih's panel, the biases
// added, and dW_ih^T has in an id's row the sum of the rows of dgates that it came with.
#pragma once

#include "packing.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Compute dtypes in which ids are taken: in 16 bits a table would be rounded, as sums are not.
template <class T>
constexpr bool kTakesIds = std::is_same_v<T, Acc<T>>;

// Of a block of units: W_ih (4H, I) and its biases (4V) to `table` (I, 4V).
template <class T, class Column>
static void pack_table(const T* weight_ih, int64_t I, const Column& column, const T* bias,
                       T* table) {
  constexpr int kWidth = kTileWidth<T>;
  pack_dense_k<typename ProductOf<T>::type>(weight_ih, I, I, kWidth, column, table);
  for (int64_t id = 0; id < I; ++id, table += kWidth)
    for (int n = 0; n < kWidth; ++n) table[n] += bias[n];
}

// The rows of so many ids.
template <class T>
static void take_rows(const T* table, const int64_t* ids, int64_t count, T* rows) {
  constexpr int kWidth = kTileWidth<T>;
  for (int64_t i = 0; i < count; ++i)
    memcpy(rows + i * kWidth, table + ids[i] * kWidth, kWidth * sizeof(T));
}

// The same without a table: from W_ih as it lies.
template <class T, class Column>
static void take_columns(const T* weight_ih, int64_t I, const Column& column, const T* bias,
                         const int64_t* ids, int64_t count, T* rows) {
  constexpr int kWidth = kTileWidth<T>;
  for (int64_t i = 0; i < count; ++i, rows += kWidth)
    for (int n = 0; n < kWidth; ++n) {
      const int64_t c = column(n);
      rows[n] = c < 0 ? T(0) : weight_ih[c * I + ids[i]] + bias[n];
    }
}

// Each of so many rows, `vectors` wide and one after another, on top of its id's (kTileWidth).
template <class T>
static void add_rows_to_table(const T* rows, int vectors, const int64_t* ids, int64_t count,
                              T* table) {
  constexpr int V = kLanes<T>;
  for (int64_t i = 0; i < count; ++i, rows += vectors * V) {
    T* row = table + ids[i] * kTileWidth<T>;
    for (int v = 0; v < vectors; ++v) store(row + v * V, load(row + v * V) + load(rows + v * V));
  }
}

// dW_ih (of so many of its rows, I wide) of `count` ids, from dgates, rows G apart: without a table.
template <class T>
static void add_to_columns(const T* dgates, int64_t G, const int64_t* ids, int64_t count,
                           int64_t rows, int64_t I, T* gradient) {
  memset(gradient, 0, size_t(rows * I) * sizeof(T));
  for (int64_t m = 0; m < rows; ++m, gradient += I)
    for (int64_t n = 0; n < count; ++n) gradient[ids[n]] += dgates[n * G + m];
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
