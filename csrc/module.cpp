// fused_lstm._C: what was built, and what this processor offers. Importing it loads
// libfused_lstm.so, which registers the operators. No torch headers here: they would cost half a
// minute of compile time.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cpu/dispatch.h"

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
}
