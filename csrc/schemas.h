// The operators' schemas, for the library that defines them: ops.cpp, and the emulation of the CUDA
// backend under a name of its own. Shapes are in lstm.h and layer.h.
#pragma once

namespace fused_lstm {

inline constexpr const char* kSchemas[] = {
    "lstm_inference(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights)"
    " -> (Tensor output, Tensor h_n, Tensor c_n)",
    "lstm_forward(Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor? batch_sizes,"
    " Tensor h_0, Tensor c_0, Tensor[] weights, Tensor output, Tensor gates, Tensor cells, "
    "bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)",
    // The same with the gates as its scratch memory: they hold dgates, or anything, afterwards.
    "lstm_backward_consuming(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
    "Tensor input, Tensor? batch_sizes,"
    " Tensor h_0, Tensor c_0, Tensor[] weights, Tensor output, Tensor(a!) gates, Tensor cells, "
    "bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)",
};

}  // namespace fused_lstm
