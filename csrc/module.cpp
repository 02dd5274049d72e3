// fused_lstm._C: what was built, and what this processor offers. Importing it loads
// libfused_lstm.so, which registers the operators. No torch headers here, but in
// module_stream.cpp and module_sampler.cpp.

#include "module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu/crowd.h"
#include "cpu/dispatch.h"
#include "cpu/processors.h"
#ifdef FUSED_LSTM_HAVE_CUDA
#include "cuda/kernels.h"
#include "cuda/plan.h"
#endif

namespace py = pybind11;
namespace cpu = fused_lstm::cpu;

namespace {

py::dict build_info() {
  static constexpr std::pair<const char*, const char*> facts[] = {FUSED_LSTM_BUILD_INFO};
  py::dict info;
  for (const auto& [name, value] : facts) {
    info[name] = value;
  }
  return info;
}

std::vector<std::pair<std::string, bool>> cpu_isas() {
  std::vector<std::pair<std::string, bool>> isas;
  for (int index = 0; index < cpu::isa_count(); ++index) {
    isas.emplace_back(cpu::isa_name(index), cpu::isa_supported(index));
  }
  return isas;
}

std::string cpu_isa() { return cpu::isa_name(cpu::isa_active()); }

void force_cpu_isa(const std::optional<std::string>& name) {
  if (!name) {
    cpu::isa_force(-1);
    return;
  }
  std::string usable;
  for (const auto& [isa, supported] : cpu_isas()) {
    usable += supported ? " " + isa : "";
  }
  for (int index = 0; index < cpu::isa_count(); ++index) {
    if (*name == cpu::isa_name(index) && cpu::isa_force(index)) {
      return;
    }
  }
  throw py::value_error("no CPU kernels for instruction set '" + *name +
                        "' here; this build and processor offer:" + usable);
}

py::dict processors() {
  const cpu::Processors found = cpu::processors();
  py::dict facts;
  facts["affinity"] = found.affinity;
  facts["quota"] = found.quota;
  facts["cap"] = found.cap;
  facts["forked"] = found.forked;
  return facts;
}

int thread_limit(int wanted, int affinity, double quota, int cap, bool forked) {
  return cpu::thread_limit(wanted, {affinity, quota, cap, forked});
}

int position(const std::string& name, const std::vector<std::string>& names) {
  for (size_t index = 0; index < names.size(); ++index) {
    if (name == names[index]) {
      return int(index);
    }
  }
  std::string expected;
  for (const std::string& one : names) {
    expected += " " + one;
  }
  throw py::value_error("'" + name + "' is none of:" + expected);
}

bool cpu_wavefront(const std::string& dtype, int T, int B, int I, int H, int P, int layers,
                   int threads) {
  const auto of = fused_lstm::Dtype(position(dtype, {"float32", "float64", "bfloat16", "float16"}));
  const fused_lstm::Sequence first = {T, B, I, H, P, nullptr, nullptr, false, P != H};
  return cpu::active_kernel(of).wavefront_pays(first, layers, threads);
}

#ifdef FUSED_LSTM_HAVE_CUDA
namespace cuda = fused_lstm::cuda;

// multiprocessors, shared memory of a block in bytes, compute capability
using Properties = std::tuple<int, int, int, int>;

std::string cuda_plan(const std::string& pass, const std::string& operands, int T, int B, int H,
                      int directions, const std::optional<Properties>& given) {
  const auto which_pass = cuda::Pass(position(pass, {"forward", "backward"}));
  const auto kind = cuda::Operands(position(operands, {"bfloat16", "float16", "tf32", "float32"}));
  if (given) {
    const auto& [multiprocessors, shared_bytes, major, minor] = *given;
    const cuda::Device device{multiprocessors, shared_bytes, major, minor, true};
    return cuda::describe(cuda::plan(device, which_pass, kind, T, B, H, directions));
  }
  cuda::Device device{};
  if (const char* error = cuda::properties(device)) {
    throw std::runtime_error(std::string("no plan without a GPU's properties: ") + error);
  }
  return cuda::describe(cuda::choose(which_pass, kind, T, B, H, directions));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What was built, with what: a dict of str with torch, compiler, flags, cpu, openmp, cuda.");
  m.def("cpu_isas", &cpu_isas,
        "The instruction sets that CPU kernels were built for, slowest first, each with whether "
        "this processor can run it: list of (name, supported).");
  m.def("cpu_isa", &cpu_isa, "The instruction set whose kernels serve calls now.");
  m.def("force_cpu_isa", &force_cpu_isa, py::arg("name").none(true),
        "Serve calls with the kernels of one instruction set; None returns to the best supported.\n"
        "Raises ValueError for one that was not built or that this processor can't run.");
  m.def("cpu_wavefront", &cpu_wavefront, py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::arg("P"), py::arg("layers"), py::arg("threads"),
        "Whether so many threads take the layers of a stack, one direction, at once where nothing "
        "is to be recorded.\n"
        "dtype: float32, float64, bfloat16, float16. Raises ValueError for other words.");
  m.def("processors", &processors,
        "What limits the threads of a call: a dict with affinity (processors that this thread may "
        "run on), quota (of time, in processors; 0: none), cap (FUSED_LSTM_THREADS; 0: not set), "
        "forked (off a process with several threads).");
  m.def("thread_limit", &thread_limit, py::arg("wanted"), py::arg("affinity"), py::arg("quota"),
        py::arg("cap"), py::arg("forked"),
        "The threads of a call when torch has `wanted`, with limits as `processors` gives them.");
  m.def("processor_quota", &cpu::processor_quota, py::arg("proc_cgroup"), py::arg("mount"),
        "The quota that control groups set: from a file as /proc/self/cgroup, and a folder as "
        "/sys/fs/cgroup.");
  m.def(
      "set_patient", [](bool patient) { cpu::impatient = !patient; }, py::arg("patient"),
      "False, for tests: of threads that meet at every step, the last to come to their first "
      "meeting goes on alone.");
  m.def(
      "set_any_pace", [](bool any) { cpu::any_pace = any; }, py::arg("any"),
      "True, for tests: brief calls take several threads whether or not others came before them.");
  m.def("keep_crowd", &cpu::keep_crowd, py::arg("threads"),
        "For tests: OpenMP's threads sleep soon where they wait, as beside busy processes.");
  m.def("dismiss_crowd", &cpu::dismiss_crowd, "For tests: they spin again.");
  define_stream(m);
  define_sampler(m);
  define_mask(m);
  py::class_<cpu::Contention>(m, "Contention", "How calls avoid processors in demand.")
      .def(py::init<int64_t>(), py::arg("first"))
      .def("paused", &cpu::Contention::paused, py::arg("now"))
      .def("lasts", &cpu::Contention::lasts, py::arg("now"))
      .def("report", &cpu::Contention::report, py::arg("stalled"), py::arg("began"),
           py::arg("now"));
  py::class_<cpu::Queue>(m, "Queue", "Whether this process's threads stand in line for processors.")
      .def(py::init<int64_t, std::string>(), py::arg("now"), py::arg("tasks") = "/proc/self/task")
      .def("stood_in", &cpu::Queue::stood_in, py::arg("now"));
  py::class_<cpu::Pace>(m, "Pace", "Whether brief calls follow one upon the other.")
      .def(py::init<>())
      .def("quick", &cpu::Pace::quick, py::arg("now"));
#ifdef FUSED_LSTM_HAVE_CUDA
  m.def(
      "cuda_plan", &cuda_plan, py::arg("pass_"), py::arg("operands"), py::arg("T"), py::arg("B"),
      py::arg("H"), py::arg("directions") = 1, py::arg("device").none(true) = py::none(),
      "How a call of these sizes is run, in words that begin with 'persistent' or say why it is "
      "not.\n"
      "pass_: forward, backward; operands: bfloat16, float16, tf32, float32. device: of which "
      "to\nthink, as (multiprocessors, shared memory of a block in bytes, major, minor), or "
      "None for the\ncurrent one. Raises ValueError for other words, RuntimeError without a GPU.");
  m.def("cuda_single", &cuda::is_single, py::arg("T"), py::arg("B"), py::arg("weight_bytes"),
        "Whether a forward without projection, of so many bytes of weights a direction, is one "
        "launch.");
  m.def("cuda_usable", &cuda::usable,
        "Whether the CUDA kernels were compiled for the current device.");
#endif
}
