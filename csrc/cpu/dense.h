// Matrix-vector products from the weights as they lie, for calls too short to pay for packing: V
// dot products at a time, each along a row of the weights, summed across lanes at the end.
#pragma once

#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// out[l] = init[l] + sum over k of weights[l * stride + k] * operand[k], for `lanes` of the
// vector's lanes. The operand is zero from K up to whole vectors.
template <class T>
static void dense_dots(const T* weights, int64_t stride, int64_t K, const Acc<T>* operand,
                       int lanes, const Acc<T>* init, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int V = kLanes<A>;
  constexpr int kAtOnce = V < 8 ? V : 8;  // rows whose sums are in registers together
  const int64_t whole = K / V * V;
  const int rest = int(K - whole);
  Vec<A> total[V] = {};
  for (int l = 0; l < lanes; l += kAtOnce) {
    Vec<A> sum[kAtOnce] = {};
    const T* row[kAtOnce];
    // rows beyond the last one repeat it: their lanes are not stored
    for (int i = 0; i < kAtOnce; ++i)
      row[i] = weights + (l + i < lanes ? l + i : lanes - 1) * stride;
    for (int64_t k = 0; k < whole; k += V) {
      const Vec<A> a = load(operand + k);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) sum[i] += load(row[i] + k) * a;
    }
    if (rest) {
      const Vec<A> a = load(operand + whole);
      for (int i = 0; i < kAtOnce; ++i) sum[i] += load_part(row[i] + whole, rest) * a;
    }
    for (int i = 0; i < kAtOnce; ++i) total[l + i] = sum[i];
  }
  store(out, load(init) + sum_each<A>(total));
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
