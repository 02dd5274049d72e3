// The operators' schemas. Shapes are in lstm.h and layer.h; a backend registers its kernels for its
// dispatch key (cpu/host.cpp), Python the rest (fused_lstm/ops.py: fakes, autograd, FLOP formulas).
#include <torch/library.h>

TORCH_LIBRARY(fused_lstm, m) {
  m.def(
      "lstm_inference(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights)"
      " -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "lstm_forward(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights)"
      " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor? batch_sizes,"
      " Tensor h_0, Tensor c_0, Tensor[] weights, Tensor output, Tensor gates, Tensor cells, "
      "bool[] needs)"
      " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)");
}
