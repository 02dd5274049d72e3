// The operators' arguments: their schemas, for the libraries that define them (ops.cpp, triton.cpp,
// and the emulation of the CUDA backend under a name of its own), and the same as C++ has them.
// Shapes are in lstm.h and layer.h.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fused_lstm {

using Optional = std::optional<at::Tensor>;

using OutputAndStates = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OutputAndSaved = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using GradientTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// input, batch_sizes, h_0, c_0, weights
template <class Returns>
using ForwardSignature = Returns(const at::Tensor&, const Optional&, const at::Tensor&,
                                 const at::Tensor&, at::TensorList);

// grad_output, grad_h_n, grad_c_n, those of the forward, output, gates, cells, needs
template <class Gates>
using BackwardSignature = GradientTuple(const Optional&, const Optional&, const Optional&,
                                        const at::Tensor&, const Optional&, const at::Tensor&,
                                        const at::Tensor&, at::TensorList, const at::Tensor&, Gates,
                                        const at::Tensor&, c10::List<bool>);

inline const std::string kLayerArguments =
    "Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights";

// Of the first layer's input, and of all layers: states (L*D, B, ...), weights one layer after the
// other. Backends may do without: Python then calls lstm_inference for each.
inline const std::string kStackSchema = "lstm_stack_inference(" + kLayerArguments +
                                        ", int layers) -> (Tensor output, Tensor h_n, Tensor c_n)";

inline std::string forward_schema(const std::string& name, const std::string& saved) {
  return name + "(" + kLayerArguments + ") -> (Tensor output, Tensor h_n, Tensor c_n" + saved + ")";
}

inline std::string backward_schema(const std::string& name, const std::string& gates) {
  return name + "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " + kLayerArguments +
         ", Tensor output, " + gates + " gates, Tensor cells, bool[] needs)" +
         " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)";
}

inline std::vector<std::string> schemas() {
  return {
      forward_schema("lstm_inference", ""),
      forward_schema("lstm_forward", ", Tensor gates, Tensor cells"),
      backward_schema("lstm_backward", "Tensor"),
      // The same with the gates as its scratch memory: they hold dgates, or anything, afterwards.
      backward_schema("lstm_backward_consuming", "Tensor(a!)"),
  };
}

}  // namespace fused_lstm
