// fused_lstm._C.Sampler: ids in, ids out, a whole text a call.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/DistributionsHelper.h>
#include <torch/csrc/Generator.h>

#include <mutex>

#include "cpu/sampler.h"
#include "module.h"
#include "module_tensors.h"

using namespace fused_lstm;
using cpu::Sampler;

namespace {

// head, bias (None), table (None), embedding (None); dense, and of the types that
// StreamTextWeights says.
using TextWeights = std::vector<py::object>;

std::unique_ptr<Sampler> make_sampler(const std::string& dtype, const std::string& width,
                                      int64_t batch_size, int64_t input_size, int64_t hidden_size,
                                      int64_t proj_size, const std::vector<Layer>& layers,
                                      int64_t vocabulary, const TextWeights& weights) {
  const cpu::StreamShape shape = shape_of(layers, batch_size, input_size, hidden_size, proj_size);
  const cpu::StreamWeights text = pointers({weights})[0];
  return with_dtypes(dtype, width, [&](Dtype type, cpu::StreamWidth kept) {
    return std::make_unique<Sampler>(
        type, kept, shape, pointers(layers), vocabulary,
        cpu::StreamTextWeights{text.ih, text.hh, text.bias_ih, text.bias_hh});
  });
}

at::Generator generator_of(py::handle object) {
  if (object.is_none()) return at::detail::getDefaultCPUGenerator();
  if (!THPGenerator_Check(object.ptr()))
    throw py::type_error("generator must be a torch.Generator");
  at::Generator generator = reinterpret_cast<THPGenerator*>(object.ptr())->cdata;
  if (generator.device() != at::kCPU)
    throw std::runtime_error(
        words("generator must be on the CPU, as the model is, not on ", generator.device()));
  return generator;
}

// given (T, B) int64 in the vocabulary -> (steps drawn, B).
py::object draw(Sampler& sampler, py::handle object, int64_t length, double temperature,
                int64_t top_k, double top_p, const std::vector<int64_t>& stop,
                py::handle given_generator) {
  const int64_t B = sampler.shape().B;
  const at::Tensor given = tensor(object, "ids").contiguous();
  if (given.scalar_type() != at::kLong) throw py::value_error("ids must be of dtype torch.int64");
  const int64_t T = given.dim() == 2 ? given.size(0) : 0;
  if (T == 0 || given.size(1) != B)
    throw std::runtime_error(words("ids must be (T, B) with B = ", B, ", got ", given.sizes()));
  const int64_t* from = given.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < T * B; ++i)
    if (from[i] < 0 || from[i] >= sampler.vocabulary())
      throw py::index_error(
          words("id ", from[i], " is not among the ", sampler.vocabulary(), " of the vocabulary"));
  std::vector<int64_t> ids(from, from + T * B);
  ids.resize(size_t((T + length) * B));
  at::Generator generator = generator_of(given_generator);
  at::CPUGeneratorImpl* const source = at::check_generator<at::CPUGeneratorImpl>(generator);
  // As torch.rand(B, dtype=torch.float64, generator=generator) draws them.
  const auto uniform = [source](double* to, int64_t count) {
    const at::uniform_real_distribution<double> distribution(0, 1);
    const std::scoped_lock lock(source->mutex_);
    for (int64_t i = 0; i < count; ++i) to[i] = distribution(source);
  };
  const int threads = sampler.is_shared() && !at::in_parallel_region() ? at::get_num_threads() : 1;
  int64_t steps = 0;
  {
    const py::gil_scoped_release others_may_run;
    steps =
        sampler.draw(ids.data(), T, length, {temperature, top_k, top_p}, stop, uniform, threads);
  }
  const at::Tensor drawn = at::detail::empty_cpu({steps, B}, at::TensorOptions().dtype(at::kLong));
  std::copy_n(ids.data() + T * B, steps * B, drawn.mutable_data_ptr<int64_t>());
  return steal(THPVariable_Wrap(drawn));
}

}  // namespace

void define_sampler(py::module_& m) {
  py::class_<Sampler>(m, "Sampler", "A stream of ids: fused_lstm.generation.")
      .def(py::init(&make_sampler), py::arg("dtype"), py::arg("width"), py::arg("batch_size"),
           py::arg("input_size"), py::arg("hidden_size"), py::arg("proj_size"), py::arg("layers"),
           py::arg("vocabulary"), py::arg("weights"))
      .def("draw", &draw, py::arg("ids"), py::arg("length"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("stop"), py::arg("generator").none(true))
      .def("state", &state<Sampler>)
      .def("set_state", &set_state<Sampler>, py::arg("h_0"), py::arg("c_0"))
      .def_property_readonly("nbytes", [](const Sampler& sampler) {
        return sampler.weight_bytes() + sampler.text_bytes() + sampler.state_bytes();
      });
}
