// What the files of fused_lstm._C have in common that take and give tensors: the only ones that know
// both torch and Python.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/stream.h"
#include "dtypes.h"

namespace fused_lstm {

namespace py = pybind11;

template <class... Part>
inline std::string words(const Part&... part) {
  std::ostringstream text;
  (text << ... << part);
  return text.str();
}

inline std::string name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    default:
      return words("torch.", c10::toString(type));
  }
}

inline const at::Tensor& tensor(py::handle object, const char* what) {
  if (!THPVariable_Check(object.ptr()))
    throw py::type_error(words(what, " must be a Tensor, not ",
                               py::str(py::type::of(object).attr("__name__")).cast<std::string>()));
  const at::Tensor& found = THPVariable_Unpack(object.ptr());
  if (!found.is_cpu() || found.layout() != at::kStrided)
    throw std::runtime_error(words("the stream's weights are on cpu, ", what, " is on ",
                                   found.device(), ", ", found.layout()));
  return found;
}

inline void check_sizes(const at::Tensor& found, at::IntArrayRef sizes, const char* message) {
  if (found.sizes() != sizes) {
    std::string expected = words(sizes);
    expected.front() = '(';
    expected.back() = ')';
    throw std::runtime_error(words(message, expected, ", got ", found.sizes()));
  }
}

inline py::object steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// One layer's w_ih, w_hh, b_ih, b_hh, w_hr, None where absent; dense, the biases in the stream's
// dtype. Sizes have been checked (Stream in fused_lstm/stream.py).
using Layer = std::vector<py::object>;

inline std::vector<cpu::StreamWeights> pointers(const std::vector<Layer>& layers) {
  std::vector<cpu::StreamWeights> found;
  for (const Layer& layer : layers) {
    const void* at[5] = {};
    for (size_t i = 0; i < 5 && i < layer.size(); ++i) {
      if (layer[i].is_none()) continue;
      const at::Tensor& weight = tensor(layer[i], "a weight");
      if (!weight.is_contiguous() || weight.is_neg())
        throw std::runtime_error("weights must be contiguous");
      at[i] = weight.const_data_ptr();
    }
    found.push_back({at[0], at[1], at[2], at[3], at[4]});
  }
  return found;
}

// make(dtype, width) with the stream's from their names.
template <class Make>
auto with_dtypes(const std::string& dtype, const std::string& width, const Make& make) {
  cpu::StreamWidth kept = cpu::kOwnWidth;
  if (width != dtype) kept = width == "torch.int8" ? cpu::kInt8Weights : cpu::kBFloat16Weights;
  for (int index = 0; index < kDtypes; ++index)
    if (dtype == name(kScalarTypes[index])) return make(Dtype(index), kept);
  throw py::value_error(
      words("a stream takes float32, float64, bfloat16 and float16, not ", dtype));
}

inline cpu::StreamShape shape_of(const std::vector<Layer>& layers, int64_t batch_size,
                                 int64_t input_size, int64_t hidden_size, int64_t proj_size) {
  return {int64_t(layers.size()),
          batch_size,
          input_size,
          hidden_size,
          proj_size ? proj_size : hidden_size,
          proj_size > 0};
}

// (h, c) of a Stream or a Sampler.
template <class Stream>
std::pair<py::object, py::object> state(const Stream& stream) {
  const cpu::StreamShape& s = stream.shape();
  const at::TensorOptions options = at::TensorOptions().dtype(kScalarTypes[stream.dtype()]);
  const at::Tensor h = at::detail::empty_cpu({s.L, s.B, s.P}, options);
  const at::Tensor c = at::detail::empty_cpu({s.L, s.B, s.H}, options);
  stream.read(h.mutable_data_ptr(), c.mutable_data_ptr());
  return {steal(THPVariable_Wrap(h)), steal(THPVariable_Wrap(c))};
}

template <class Stream>
void set_state(Stream& stream, py::handle h_0, py::handle c_0) {
  const cpu::StreamShape& s = stream.shape();
  const at::ScalarType type = kScalarTypes[stream.dtype()];
  const auto checked = [&](py::handle object, int64_t columns, const char* what,
                           const char* message) {
    const at::Tensor& found = tensor(object, what);
    check_sizes(found, {s.L, s.B, columns}, message);
    if (found.scalar_type() != type)
      throw py::value_error(
          words(what, " must be of dtype ", name(type), ", got ", name(found.scalar_type())));
    return found.resolve_neg().contiguous();
  };
  const at::Tensor h = checked(h_0, s.P, "h_0", "Expected hidden[0] size ");
  const at::Tensor c = checked(c_0, s.H, "c_0", "Expected hidden[1] size ");
  stream.write(h.const_data_ptr(), c.const_data_ptr());
}

}  // namespace fused_lstm
