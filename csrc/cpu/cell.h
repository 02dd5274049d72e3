// What follows a tile's sums in a forward: activation, cell update, o tanh(c).
#pragma once

#include "activations.h"
#include "product.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Rows of one block of units: sums (rows, 4V) of the four gates, c (rows, V) c_stride apart.
// save(row, gates, c) has the activated gates and the new cell, emit(row, o tanh(c)) what becomes
// h_t. Two rounds, so that tanh(c) need not wait for the gates of its own row.
template <class A, class Save, class Emit>
FUSED_LSTM_INLINE void update_cells(int rows, A* sums, A* c, int64_t c_stride, const Save& save,
                                    const Emit& emit) {
  constexpr int V = kLanes<A>, kWidth = kTileWidth<A>;
  for (int r = 0; r < rows; ++r) {
    A* row = sums + r * kWidth;
    Vec<A> gate[4] = {load(row), load(row + V), load(row + 2 * V), load(row + 3 * V)};
    activate_gates<A>(gate);
    const Vec<A> cell = multiply_add(gate[1], load(c + r * c_stride), gate[0] * gate[2]);
    store(c + r * c_stride, cell);
    store(row, gate[3]);
    save(r, gate, cell);
  }
  int r = 0;
  for (; r + 1 < rows; r += 2) {
    Vec<A> cell[2] = {load(c + r * c_stride), load(c + (r + 1) * c_stride)};
    tanh_each<A, 2>(cell);
    for (int i = 0; i < 2; ++i) emit(r + i, load(sums + (r + i) * kWidth) * cell[i]);
  }
  if (r < rows) {
    Vec<A> cell = load(c + r * c_stride);
    tanh_each<A, 1>(&cell);
    emit(r, load(sums + r * kWidth) * cell);
  }
}

// A row of the product's operand, rounded to the compute dtype T first: the next step sees what the
// caller sees.
template <class T, bool whole, class Elem>
FUSED_LSTM_INLINE void store_operand(Elem* to, Vec<Acc<T>> value, int lanes) {
  if constexpr (!std::is_same_v<Elem, T>) {
    T rounded[kLanes<Acc<T>>];
    store(rounded, value);
    value = load(rounded);
  }
  store_lanes<whole>(to, value, lanes);
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
