// fused_lstm._C.Stream: tensors in, tensors out. A step may take 2 us; an operator that does nothing
// but make its output takes 1.2. This takes tensors as Python has them.

#include <optional>

#include "module.h"
#include "module_tensors.h"

using namespace fused_lstm;
using cpu::Stream, cpu::StreamShape;

namespace {

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

std::unique_ptr<Stream> make_stream(const std::string& dtype, const std::string& width,
                                    int64_t batch_size, int64_t input_size, int64_t hidden_size,
                                    int64_t proj_size, const std::vector<Layer>& layers) {
  const StreamShape shape = shape_of(layers, batch_size, input_size, hidden_size, proj_size);
  return with_dtypes(dtype, width, [&](Dtype type, cpu::StreamWidth kept) {
    return std::make_unique<Stream>(type, kept, shape, pointers(layers));
  });
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
      .def(py::init(&make_stream), py::arg("dtype"), py::arg("width"), py::arg("batch_size"),
           py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size"), py::arg("layers"))
      .def("step", &step, py::arg("input"), py::arg("out"))
      .def("fork", [](const Stream& stream) { return std::make_unique<Stream>(stream); })
      .def(
          "pack",
          [](Stream& stream, const std::vector<Layer>& layers) { stream.pack(pointers(layers)); },
          py::arg("layers"))
      .def("reset", &reset, py::arg("rows").none(true))
      .def("state", &state<Stream>)
      .def("set_state", &set_state<Stream>, py::arg("h_0"), py::arg("c_0"))
      .def_property_readonly("weight_bytes", &Stream::weight_bytes)
      .def_property_readonly("state_bytes", &Stream::state_bytes);
}
