// Triton's operators: those of ops.cpp in a library of their own, for on a GPU that both backends
// serve a backward must be of the backend that ran the forward. Its recurrence is in Python
// (fused_lstm/triton); what comes before and after it is the same as CUDA's.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "recurrence.h"

namespace fused_lstm {
namespace {

// The direction's weights but W_ih: (w_hh, b_ih, b_hh, w_hr) of each, without those that are
// absent.
std::vector<at::Tensor> recurrent_weights(const Layer& layer) {
  std::vector<at::Tensor> flat;
  for (const Weights& w : layer.weights)
    for (const at::Tensor& weight : {w.hh, w.bias_ih, w.bias_hh, w.hr})
      if (weight.defined()) flat.push_back(weight);
  return flat;
}

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

void call_python(const c10::OperatorHandle& function, std::initializer_list<at::Tensor> tensors,
                 const Layer& layer) {
  torch::jit::Stack stack;
  for (const at::Tensor& tensor : tensors)
    stack.emplace_back(tensor.defined() ? c10::IValue(tensor) : c10::IValue());
  stack.emplace_back(recurrent_weights(layer));
  stack.emplace_back(layer.packed ? c10::IValue(layer.batch_sizes) : c10::IValue());
  function.callBoxed(stack);
}

class ForwardRecurrence {
 public:
  explicit ForwardRecurrence(const ForwardCall& call) : call_(call) {}

  int64_t together() const { return call_.layer.directions; }

  void run(int64_t, const at::Tensor& gates, const Results& results) const {
    const Layer& layer = call_.layer;
    static const auto function = find("fused_lstm_triton::recurrence_forward");
    call_python(function,
                {gates, results.cells, results.output.view({layer.N, -1}), results.h_n, results.c_n,
                 call_.h_0, call_.c_0},
                layer);
  }

 private:
  const ForwardCall& call_;
};

class BackwardRecurrence {
 public:
  explicit BackwardRecurrence(const BackwardCall& call) : call_(call) {}

  int64_t together() const { return call_.layer.directions; }
  int64_t padded_units() const { return call_.layer.H; }

  at::Tensor upload(const std::vector<RowRun>& runs) const {
    const at::Tensor rows = at::empty({int64_t(runs.size()), 2}, at::kInt);
    std::copy(runs.begin(), runs.end(), static_cast<RowRun*>(rows.data_ptr()));
    return rows.to(call_.input.device(), /*non_blocking=*/true);
  }

  void run(int64_t, const RecurrenceGradients& found) const {
    const Layer& layer = call_.layer;
    at::Tensor grad_rows = call_.grad_output;
    if (grad_rows.defined()) grad_rows = grad_rows.reshape({layer.N, layer.directions * layer.P});
    static const auto function = find("fused_lstm_triton::recurrence_backward");
    call_python(function,
                {found.dgates.view({layer.directions, layer.N, 4 * layer.H}), found.grad_c_0,
                 found.hidden, found.grad_projected, grad_rows, call_.grad_h_n, call_.grad_c_n,
                 call_.gates, call_.cells, call_.c_0},
                layer);
  }

 private:
  const BackwardCall& call_;
};

}  // namespace

TORCH_LIBRARY(fused_lstm_triton, m) {
  for (const std::string& schema : schemas()) m.def(schema.c_str());
  m.def(
      "recurrence_forward(Tensor(a!) gates, Tensor(b!)? cells, Tensor(c!) output, Tensor(d!) h_n, "
      "Tensor(e!) c_n, Tensor h_0, Tensor c_0, Tensor[] weights, int[]? batch_sizes) -> ()");
  m.def(
      "recurrence_backward(Tensor(a!) dgates, Tensor(b!) grad_c_0, Tensor(c!)? hidden, "
      "Tensor(d!)? grad_projected, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor gates, Tensor cells, Tensor c_0, Tensor[] weights, int[]? batch_sizes) -> ()");
}

// For any device: which of them Triton reaches is decided in Python (triton/__init__.py), and its
// interpreter, in tests, takes the CPU's tensors.
TORCH_LIBRARY_IMPL(fused_lstm_triton, CompositeExplicitAutograd, m) {
  Operators<forward_by<ForwardRecurrence>, backward_by<BackwardRecurrence>>::implement(m);
}

}  // namespace fused_lstm
