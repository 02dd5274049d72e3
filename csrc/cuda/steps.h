// The step path: a product and a fused cell for each step, for what the persistent kernels don't
// serve.
#pragma once

#include "../recurrence.h"
#include "kernels.h"
#include "torch_device.h"

namespace fused_lstm::cuda {

// The options of a running cell state: float, or double for double.
inline at::TensorOptions wide(const LayerCall& call) {
  return call.dtype == kFloat64 ? call.options : call.options.dtype(at::kFloat);
}

// Direction d; gates (N, 4H) hold x W_ih^T, and the activated gates afterwards if they are saved.
inline void forward_by_steps(const ForwardCall& call, int64_t d, const at::Tensor& gates,
                             const Results& results, Stream stream) {
  const Layer& layer = call.layer;
  const Weights& w = layer.weights[d];
  const Sequence seq = sequence_of(layer, d);
  const int64_t H = layer.H, P = layer.P, width = layer.directions * P;

  // Both states are kept where they are wanted in the end, the cell's if that is wide enough.
  at::Tensor h = results.h_n.select(0, d), c_n = results.c_n.select(0, d);
  h.copy_(call.h_0.select(0, d));
  const bool narrow = call.dtype == kBFloat16 || call.dtype == kFloat16;
  at::Tensor c = narrow ? at::empty({layer.B, H}, wide(call)) : c_n;
  c.copy_(call.c_0.select(0, d));
  at::Tensor hidden;
  if (layer.projected) hidden = at::empty({layer.B, H}, call.options);

  ForwardStep step{};
  step.dtype = call.dtype;
  step.H = H;
  step.bias_ih = data(w.bias_ih);
  step.bias_hh = data(w.bias_hh);
  step.c = data(c);
  step.save = call.save;
  const StepProduct product(call);
  for (int64_t s = 0; s < layer.T; ++s) {
    const int64_t t = seq.step(s, false), rows = seq.rows(t), first = seq.first_row(t);
    void* const output = columns(results.output, first * width + d * P);
    step.rows = rows;
    step.gates = columns(gates, first * 4 * H);
    if (call.save) step.cells = columns(results.cells, (d * layer.N + first) * H);
    step.h = layer.projected ? data(hidden) : output;
    step.h_stride = layer.projected ? H : width;
    step.h_again = layer.projected ? nullptr : data(h);
    product(rows, data(h), w.hh, StepProduct::kTransposed, true, step.gates);
    check(run(step, stream));
    if (layer.projected) {
      product(rows, data(hidden), w.hr, StepProduct::kTransposed, false, data(h));
      check(run(Sum{call.dtype, rows, P, data(h), P, nullptr, output, width}, stream));
    }
  }
  if (narrow) c_n.copy_(c);
}

// Direction d, alone.
inline void backward_by_steps(const BackwardCall& call, int64_t d, const RecurrenceGradients& found,
                              Stream stream) {
  const Layer& layer = call.layer;
  const Weights& w = layer.weights[d];
  const Sequence seq = sequence_of(layer, d);
  const int64_t H = layer.H, P = layer.P;
  const at::Tensor& dy = call.grad_output;
  const int64_t stride_t = dy.defined() ? dy.stride(0) : 0;
  const int64_t stride_b = dy.defined() ? dy.stride(layer.packed ? 0 : 1) : 0;
  const auto start = [&](at::Tensor state, const at::Tensor& grad) {
    return grad.defined() ? state.copy_(grad.select(0, d)) : state.zero_();
  };
  const at::Tensor dh = start(at::empty({layer.B, P}, call.options), call.grad_h_n);
  const at::Tensor dc = start(at::empty({layer.B, H}, wide(call)), call.grad_c_n);
  at::Tensor grad_hidden;
  if (layer.projected) grad_hidden = at::empty({layer.B, H}, call.options);

  BackwardStep step{};
  step.dtype = call.dtype;
  step.H = H;
  step.c_0 = part(call.c_0, d);
  step.dc = data(dc);
  const StepProduct product(call);
  for (int64_t s = 0; s < layer.T; ++s) {
    const int64_t t = seq.step(s, true), rows = seq.rows(t), first = seq.first_row(t);
    const void* const grad_output = columns(dy, d * P + seq.offset(t, 0, stride_t, stride_b));
    step.rows = rows;
    step.gates = columns(call.gates, (d * layer.N + first) * 4 * H);
    step.cells = columns(call.cells, (d * layer.N + first) * H);
    step.continued = seq.continued(t);
    step.cells_before = step.continued > 0
                            ? columns(call.cells, (d * layer.N + seq.first_row(seq.before(t))) * H)
                            : nullptr;
    step.dgates = columns(found.dgates, first * 4 * H);
    if (layer.projected) {
      void* const projected = columns(found.grad_projected, first * P);
      check(run(Sum{call.dtype, rows, P, grad_output, stride_b, data(dh), projected, P}, stream));
      product(rows, projected, w.hr, StepProduct::kPlain, false, data(grad_hidden));
      step.grad_output = data(grad_hidden);
      step.grad_output_stride = H;
      step.hidden = columns(found.hidden, first * H);
    } else {
      step.grad_output = grad_output;
      step.grad_output_stride = stride_b;
      step.dh = data(dh);
    }
    check(run(step, stream));
    if (s < layer.T - 1) product(rows, step.dgates, w.hh, StepProduct::kPlain, false, data(dh));
  }
  found.grad_c_0[0].copy_(dc);
}

}  // namespace fused_lstm::cuda
