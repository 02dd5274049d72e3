// The kernels without a product of their own: the cell of the step path, and what moves rows.
// One thread an element, whatever the shape; all of them are bound by memory or by their launch.

#include <algorithm>

#include "cell.cuh"
#include "element.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_lstm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 8192;  // beyond it, threads take several elements

// The elements of (rows, columns) that this thread takes: element at = row * columns + column.
struct Walker {
  int64_t at, columns, end;

  FUSED_LSTM_DEVICE Walker(int64_t rows, int64_t width)
      : at(int64_t(block_index()) * kThreads + thread_index()), columns(width), end(rows * width) {}
  FUSED_LSTM_DEVICE bool more() const { return at < end; }
  FUSED_LSTM_DEVICE void next() { at += int64_t(block_count()) * kThreads; }
  FUSED_LSTM_DEVICE int64_t row() const { return at / columns; }
};

template <class E>
FUSED_LSTM_KERNEL(kThreads)
forward_step_kernel(FUSED_LSTM_PARAMS(ForwardStep) step) {
  using Wide = typename E::Wide;
  const int64_t H = step.H;
  const Reader<E> gates(step.gates), bias_ih(step.bias_ih), bias_hh(step.bias_hh);
  Wide* const c_state = static_cast<Wide*>(step.c);
  for (Walker w(step.rows, H); w.more(); w.next()) {
    const int64_t row = w.row(), unit = w.at - row * H;
    Wide sum[4];
    for (int k = 0; k < 4; ++k) {
      sum[k] = gates[row * 4 * H + k * H + unit];
      if (bias_ih) sum[k] += bias_ih[k * H + unit] + bias_hh[k * H + unit];
    }
    const Cell<Wide> cell = update_cell<E::kFast>(sum, c_state[w.at]);
    c_state[w.at] = cell.c;
    write<E>(step.h, row * step.h_stride + unit, cell.h);
    if (step.h_again) write<E>(step.h_again, w.at, cell.h);
    if (!step.save) continue;
    write<E>(step.cells, w.at, cell.c);
    for (int k = 0; k < 4; ++k) write<E>(step.gates, row * 4 * H + k * H + unit, cell.gate[k]);
  }
}

template <class E>
FUSED_LSTM_KERNEL(kThreads)
backward_step_kernel(FUSED_LSTM_PARAMS(BackwardStep) step) {
  using Wide = typename E::Wide;
  const int64_t H = step.H;
  const Reader<E> gates(step.gates), cells(step.cells), before(step.cells_before), c_0(step.c_0),
      grad_output(step.grad_output), grad_h(step.dh);
  Wide* const dc_state = static_cast<Wide*>(step.dc);
  for (Walker w(step.rows, H); w.more(); w.next()) {
    const int64_t row = w.row(), unit = w.at - row * H, first = row * 4 * H + unit;
    const Wide gate[4] = {gates[first], gates[first + H], gates[first + 2 * H],
                          gates[first + 3 * H]};
    const Wide c_before = row < step.continued ? before[w.at] : c_0[w.at];
    Wide dh = 0;
    if (grad_output) dh += grad_output[row * step.grad_output_stride + unit];
    if (grad_h) dh += grad_h[w.at];
    const CellSlopes<Wide> slopes = cell_slopes<E::kFast>(gate, cells[w.at], c_before);
    const CellGradient<Wide> found = cell_gradient(slopes, dh, dc_state[w.at]);
    dc_state[w.at] = found.dc_before;
    for (int k = 0; k < 4; ++k) write<E>(step.dgates, first + k * H, found.gate[k]);
    if (step.hidden) write<E>(step.hidden, w.at, slopes.hidden);
  }
}

template <class E>
FUSED_LSTM_KERNEL(kThreads)
sum_kernel(FUSED_LSTM_PARAMS(Sum) call) {
  const Reader<E> a(call.a), b(call.b);
  for (Walker w(call.rows, call.columns); w.more(); w.next()) {
    const int64_t row = w.row(), column = w.at - row * call.columns;
    typename E::Wide sum = 0;
    if (a) sum = a[row * call.a_stride + column];
    if (b) sum = a ? sum + b[w.at] : b[w.at];
    write<E>(call.sum, row * call.sum_stride + column, sum);
  }
}

// As many runs as fit into 4 KB of kernel arguments, which every CUDA takes.
struct Upload {
  static constexpr int kRuns = 500;
  RowRun* to;
  int count;
  RowRun rows[kRuns];
};

FUSED_LSTM_KERNEL(kThreads)
upload_kernel(FUSED_LSTM_PARAMS(Upload) call) {
  for (int index = thread_index(); index < call.count; index += kThreads)
    call.to[index] = call.rows[index];
}

template <class Params>
const char* launch_elements(void (*kernel)(Params), int64_t elements, Stream stream,
                            const Params& params) {
  if (elements == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((elements + kThreads - 1) / kThreads, kMostBlocks);
  return launch(kernel, Grid{int(blocks), kThreads, 0, false}, stream, params);
}

}  // namespace

const char* run(const ForwardStep& step, Stream stream) {
  return with_element(step.dtype, [&](auto element) {
    return launch_elements(forward_step_kernel<decltype(element)>, step.rows * step.H, stream,
                           step);
  });
}

const char* run(const BackwardStep& step, Stream stream) {
  return with_element(step.dtype, [&](auto element) {
    return launch_elements(backward_step_kernel<decltype(element)>, step.rows * step.H, stream,
                           step);
  });
}

const char* run(const Sum& call, Stream stream) {
  return with_element(call.dtype, [&](auto element) {
    return launch_elements(sum_kernel<decltype(element)>, call.rows * call.columns, stream, call);
  });
}

const char* upload(const RowRun* rows, int32_t count, RowRun* device_rows, Stream stream) {
  Upload call;
  for (int32_t first = 0; first < count; first += Upload::kRuns) {
    call.to = device_rows + first;
    call.count = std::min(Upload::kRuns, count - first);
    std::copy_n(rows + first, call.count, call.rows);
    if (const char* error = launch(upload_kernel, Grid{1, kThreads, 0, false}, stream, call))
      return error;
  }
  return nullptr;
}

bool usable() { return resident_blocks(upload_kernel, Grid{1, kThreads, 0, false}) > 0; }

}  // namespace fused_lstm::cuda
