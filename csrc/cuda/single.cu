// A call of one step and few rows by one launch: both products, the cell, and what is saved.
//
//   weight_ih (4H, I), weight_hh (4H, H), bias_ih, bias_hh (4H), input (B, I) by a stride,
//   h_0, c_0 (B, H)  ->  output (B, H) by a stride, h_n, c_n (B, H), gates (B, 4H), cells (B, H)
//
// A warp has one hidden unit: its lanes go along the four rows of weights, each multiplied by every
// row of the batch, and the sums are added up across lanes. Lane b then has row b's cell. Sums are in
// registers, in a fixed order; nothing is shared, and no block waits for another.
#include <algorithm>

#include "cell.cuh"
#include "element.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_lstm::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;  // of a block: H 128 fills 32 multiprocessors

// What one lane adds to the sums of a unit: `first` is the unit's row of gate i, and the other
// gates' are H rows further on.
template <class E, int kRows>
FUSED_LSTM_DEVICE void add_product(typename E::Wide (&sum)[kRows][4], const void* weights,
                                   int64_t first, int H, int K, const void* operand, int64_t stride,
                                   int rows) {
  const Reader<E> w(weights), x(operand);
  for (int k = thread_index() % kLanes; k < K; k += kLanes) {
    typename E::Wide weight[4];
    for (int gate = 0; gate < 4; ++gate) weight[gate] = w[(first + int64_t(gate) * H) * K + k];
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) continue;
      const typename E::Wide value = x[b * stride + k];
      for (int gate = 0; gate < 4; ++gate) sum[b][gate] += weight[gate] * value;
    }
  }
}

template <class Wide>
FUSED_LSTM_DEVICE Wide sum_across(Wide value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class E>
FUSED_LSTM_DEVICE void write_cell(const SingleStep& step, const SingleDirection& d, int b, int unit,
                                  typename E::Wide (&sum)[4]) {
  using Wide = typename E::Wide;
  const Reader<E> bias_ih(d.bias_ih), bias_hh(d.bias_hh), c_0(d.c_0);
  const int64_t H = step.H, at = b * H + unit;
  for (int gate = 0; gate < 4; ++gate)
    if (bias_ih) sum[gate] += bias_ih[gate * H + unit] + bias_hh[gate * H + unit];
  const Cell<Wide> cell = update_cell<E::kFast>(sum, c_0[at]);
  write<E>(d.output, b * step.output_stride + unit, cell.h);
  write<E>(d.h_n, at, cell.h);
  write<E>(d.c_n, at, cell.c);
  if (!d.gates) return;
  write<E>(d.cells, at, cell.c);
  for (int gate = 0; gate < 4; ++gate)
    write<E>(d.gates, b * 4 * H + gate * H + unit, cell.gate[gate]);
}

template <class E, int kRows>
FUSED_LSTM_KERNEL(kLanes* kWarps)
single_step_kernel(FUSED_LSTM_PARAMS(SingleStep) step) {
  using Wide = typename E::Wide;
  const int lane = thread_index() % kLanes, units = step.directions * step.H;
  for (int at = block_index() * kWarps + thread_index() / kLanes; at < units;
       at += block_count() * kWarps) {
    const int unit = at % step.H;
    const SingleDirection& d = step.direction[at / step.H];
    Wide sum[kRows][4] = {};
    add_product<E>(sum, d.weight_ih, unit, step.H, step.I, step.input, step.input_stride, step.B);
    add_product<E>(sum, d.weight_hh, unit, step.H, step.H, d.h_0, step.H, step.B);
    Wide own[4] = {};
    for (int b = 0; b < kRows; ++b)
      for (int gate = 0; gate < 4; ++gate) {
        const Wide whole = sum_across(sum[b][gate]);
        if (b == lane) own[gate] = whole;
      }
    if (lane < step.B) write_cell<E>(step, d, lane, unit, own);
  }
}

}  // namespace

const char* run(const SingleStep& step, Stream stream) {
  constexpr int kMostBlocks = 8192;
  const int blocks = (step.directions * step.H + kWarps - 1) / kWarps;
  const Grid grid{std::min(blocks, kMostBlocks), kLanes * kWarps, 0, false};
  return with_element(step.dtype, [&](auto element) {
    using E = decltype(element);
    if (step.B == 1) return launch(single_step_kernel<E, 1>, grid, stream, step);
    if (step.B <= 4) return launch(single_step_kernel<E, 4>, grid, stream, step);
    return launch(single_step_kernel<E, kMostSingleRows>, grid, stream, step);
  });
}

}  // namespace fused_lstm::cuda
