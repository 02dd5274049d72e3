// fused_lstm._C.Stream: tensors in, tensors out. A step may take 3 us, of which a call through
// torch's dispatcher would be as much again: this takes tensors as Python has them. The only file
// that knows both torch and Python; torch's headers cost it a quarter of a minute.

#include "module_stream.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/stream.h"
#include "dtypes.h"

namespace py = pybind11;
using fused_lstm::Dtype;
using fused_lstm::kScalarTypes;
using fused_lstm::cpu::Stream;
using fused_lstm::cpu::StreamShape;
using fused_lstm::cpu::StreamWeights;
using fused_lstm::cpu::StreamWidth;

namespace {

template <class... Part>
std::string words(const Part&... part) {
  std::ostringstream text;
  (text << ... << part);
  return text.str();
}

std::string name(at::ScalarType type) {
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

const at::Tensor& tensor(py::handle object, const char* what) {
  if (!THPVariable_Check(object.ptr()))
    throw py::type_error(words(what, " must be a Tensor, not ",
                               py::str(py::type::of(object).attr("__name__")).cast<std::string>()));
  const at::Tensor& found = THPVariable_Unpack(object.ptr());
  if (!found.is_cpu() || found.layout() != at::kStrided)
    throw std::runtime_error(words("the stream's weights are on the CPU, ", what, " is on ",
                                   found.device(), ", ", found.layout()));
  return found;
}

void check_sizes(const at::Tensor& found, at::IntArrayRef sizes, const char* message) {
  if (found.sizes() != sizes) {
    std::string expected = words(sizes);
    expected.front() = '(';
    expected.back() = ')';
    throw std::runtime_error(words(message, expected, ", got ", found.sizes()));
  }
}

// (B, I) or (T, B, I), as what follows reads it.
at::Tensor checked_input(const Stream& stream, py::handle object) {
  const at::Tensor& input = tensor(object, "input");
  const at::ScalarType type = kScalarTypes[stream.dtype()];
  const StreamShape& shape = stream.shape();
  if (input.scalar_type() != type)
    throw py::value_error(words("RNN input dtype (", name(input.scalar_type()),
                                ") does not match weight dtype (", name(type),
                                "). Convert input: input.to(", name(type), ")"));
  if (input.dim() != 2 && input.dim() != 3)
    throw py::value_error(
        words("LSTM: Expected input to be 2D or 3D, got ", input.dim(), "D instead"));
  if (input.size(-1) != shape.I)
    throw std::runtime_error(words("input.size(-1) must be equal to input_size. Expected ", shape.I,
                                   ", got ", input.size(-1)));
  if (input.size(-2) != shape.B)
    throw std::runtime_error(
        words("input.size(-2) must be equal to the stream's batch_size. "
              "Expected ",
              shape.B, ", got ", input.size(-2)));
  if (input.is_neg()) return input.resolve_neg();
  return input.stride(-1) == 1 || shape.I == 1 ? input : input.contiguous();
}

void check_out(const at::Tensor& out, const at::Tensor& input, at::IntArrayRef sizes) {
  if (out.scalar_type() != input.scalar_type())
    throw py::value_error(words("out must be of dtype ", name(input.scalar_type()), ", got ",
                                name(out.scalar_type())));
  check_sizes(out, sizes, "out must be of size ");
  if ((out.stride(-1) != 1 && out.size(-1) > 1) || out.is_neg())
    throw std::runtime_error("out must be dense in its last dimension");
  if (out.requires_grad())
    throw std::runtime_error("out requires a gradient, and a stream has none");
  if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();
}

py::object steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

Stream::Rows rows(const at::Tensor& of, void* data) {
  return {data, of.dim() == 3 ? of.stride(0) : 0, of.stride(-2)};
}

py::object step(Stream& stream, py::handle object, py::handle given_out) {
  at::Tensor input = checked_input(stream, object);
  const int64_t T = input.dim() == 3 ? input.size(0) : 1;
  const int64_t sizes[] = {T, stream.shape().B, stream.shape().P};
  const at::IntArrayRef wanted(sizes + (input.dim() == 2), size_t(input.dim()));
  at::Tensor out;
  if (given_out.is_none()) {
    out = at::detail::empty_cpu(wanted, input.options());
  } else {
    out = tensor(given_out, "out");
    check_out(out, input, wanted);
    if (out.is_alias_of(input)) input = input.clone();
  }
  const auto run = [&] {
    const bool shared = stream.is_shared() && !at::in_parallel_region();
    stream.run(T, rows(input, input.data_ptr()), rows(out, out.mutable_data_ptr()),
               shared ? at::get_num_threads() : 1);
  };
  if (stream.takes_long(T)) {
    const py::gil_scoped_release others_may_run;
    run();
  } else {
    run();
  }
  if (!given_out.is_none()) return py::reinterpret_borrow<py::object>(given_out);
  return steal(THPVariable_Wrap(out));
}

// --- weights ------------------------------------------------------------------------------------

// One layer's w_ih, w_hh, b_ih, b_hh, w_hr, None where absent; dense, the biases in the stream's
// dtype. Sizes have been checked (Stream in fused_lstm/stream.py).
using Layer = std::vector<py::object>;

std::vector<StreamWeights> pointers(const std::vector<Layer>& layers) {
  std::vector<StreamWeights> found;
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

std::unique_ptr<Stream> make(const std::string& dtype, const std::string& width, int64_t batch_size,
                             int64_t input_size, int64_t hidden_size, int64_t proj_size,
                             const std::vector<Layer>& layers) {
  const StreamShape shape{int64_t(layers.size()),
                          batch_size,
                          input_size,
                          hidden_size,
                          proj_size ? proj_size : hidden_size,
                          proj_size > 0};
  StreamWidth kept = fused_lstm::cpu::kOwnWidth;
  if (width != dtype)
    kept =
        width == "torch.int8" ? fused_lstm::cpu::kInt8Weights : fused_lstm::cpu::kBFloat16Weights;
  for (int index = 0; index < fused_lstm::kDtypes; ++index)
    if (dtype == name(kScalarTypes[index]))
      return std::make_unique<Stream>(Dtype(index), kept, shape, pointers(layers));
  throw py::value_error(
      words("a stream takes float32, float64, bfloat16 and float16, not ", dtype));
}

// --- states -------------------------------------------------------------------------------------

std::pair<py::object, py::object> state(const Stream& stream) {
  const StreamShape& s = stream.shape();
  const at::TensorOptions options = at::TensorOptions().dtype(kScalarTypes[stream.dtype()]);
  const at::Tensor h = at::detail::empty_cpu({s.L, s.B, s.P}, options);
  const at::Tensor c = at::detail::empty_cpu({s.L, s.B, s.H}, options);
  stream.read(h.mutable_data_ptr(), c.mutable_data_ptr());
  return {steal(THPVariable_Wrap(h)), steal(THPVariable_Wrap(c))};
}

void set_state(Stream& stream, py::handle h_0, py::handle c_0) {
  const StreamShape& s = stream.shape();
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

void reset(Stream& stream, const std::optional<std::vector<int64_t>>& rows) {
  if (!rows) return stream.reset();
  for (const int64_t row : *rows)
    if (row < 0 || row >= stream.shape().B)
      throw py::index_error(words("row ", row, " of a batch of ", stream.shape().B));
  stream.reset(*rows);
}

}  // namespace

void define_stream(py::module_& m) {
  py::class_<Stream>(m, "Stream", "Steps of a stack of layers: fused_lstm.stream.Stream.")
      .def(py::init(&make), py::arg("dtype"), py::arg("width"), py::arg("batch_size"),
           py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size"), py::arg("layers"))
      .def("step", &step, py::arg("input"), py::arg("out"))
      .def("fork", [](const Stream& stream) { return std::make_unique<Stream>(stream); })
      .def(
          "pack",
          [](Stream& stream, const std::vector<Layer>& layers) { stream.pack(pointers(layers)); },
          py::arg("layers"))
      .def("reset", &reset, py::arg("rows").none(true))
      .def("state", &state)
      .def("set_state", &set_state, py::arg("h_0"), py::arg("c_0"))
      .def_property_readonly("weight_bytes", &Stream::weight_bytes)
      .def_property_readonly("state_bytes", &Stream::state_bytes);
}
