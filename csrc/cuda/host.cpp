// The CUDA kernels behind the operators: which path serves a call's recurrence, and its buffers out
// of tensors.
//
// Nothing here waits for the GPU, and the lengths of packed sequences reach it as arguments of
// kernels, so that a call can be captured in a CUDA graph.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "../recurrence.h"
#include "kernels.h"
#include "plan.h"
#include "steps.h"
#include "torch_device.h"

namespace fused_lstm::cuda {
namespace {

// fp32 is fp32 unless torch's own flag for products allows tf32.
Operands operands_of(Dtype dtype) {
  if (dtype == kBFloat16) return kBf16;
  if (dtype == kFloat16) return kF16;
  const bool tf32 =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
          at::Float32Precision::TF32 &&
      !at::NoTF32Guard::should_disable_tf32();
  return tf32 ? kTf32 : kF32;
}

// The persistent path's plan for a call; nothing where the step path serves it.
std::optional<Plan> plan_for(const LayerCall& call, Pass pass) {
  const Layer& layer = call.layer;
  if (call.dtype == kFloat64 || layer.projected) return std::nullopt;
  const Plan found = choose(pass, operands_of(call.dtype), int(layer.T), int(layer.B), int(layer.H),
                            int(layer.directions));
  return found.persistent ? std::optional(found) : std::nullopt;
}

// To the device by way of kernel arguments: see kernels.h.
at::Tensor to_device(const std::vector<RowRun>& rows, const at::TensorOptions& options,
                     Stream stream) {
  static_assert(sizeof(RowRun) == 2 * sizeof(int32_t));
  const at::Tensor on_device = at::empty({int64_t(rows.size()), 2}, options.dtype(at::kInt));
  check(upload(rows.data(), int32_t(rows.size()), static_cast<RowRun*>(on_device.data_ptr()),
               stream));
  return on_device;
}

// What both passes do with a call: its device, sizes as the kernels take them, and the plan.
class Launcher {
 public:
  Launcher(const LayerCall& call, Pass pass)
      : device(call.input), plan(plan_for(call, pass)), options_(call.options) {
    const Layer& layer = call.layer;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(layer.N <= kMost && 4 * layer.H <= kMost,
                "fused_lstm: the CUDA kernels take up to 2^31 - 1 rows (steps times sequences) and "
                "2^29 - 1 hidden units, got ",
                layer.N, " and ", layer.H);
    extent = {int32_t(layer.T), int32_t(layer.B), int32_t(layer.H), layer.N, nullptr};
    if (!layer.packed) return;
    std::vector<RowRun> rows;
    for (int64_t t = 0; t < layer.T; ++t)
      rows.push_back({int32_t(layer.batch_sizes[t]), int32_t(layer.offsets[t])});
    steps_ = to_device(rows, options_, device.stream);
    extent.steps = static_cast<const RowRun*>(steps_.data_ptr());
  }

  int64_t together() const { return plan ? plan->directions : 1; }

  // Enqueues a pass with scratch memory of its own.
  template <class Launch>
  void launch(const Launch& launch) const {
    constexpr size_t kAlign = 256;
    const size_t bytes = workspace_bytes(*plan, extent);
    const at::Tensor block = at::empty({int64_t(bytes + kAlign)}, options_.dtype(at::kByte));
    const auto address =
        (reinterpret_cast<uintptr_t>(block.data_ptr()) + kAlign - 1) & ~(kAlign - 1);
    check(run(*plan, launch, reinterpret_cast<void*>(address), device.stream));
  }

  const CurrentDevice device;
  const std::optional<Plan> plan;  // nothing where the step path serves the call
  Extent extent;

 private:
  const at::TensorOptions options_;
  at::Tensor steps_;  // of packed rows
};

class ForwardRecurrence {
 public:
  explicit ForwardRecurrence(const ForwardCall& call) : call_(call), launcher_(call, kForward) {}

  int64_t together() const { return launcher_.together(); }

  void run(int64_t first, const at::Tensor& gates, const Results& results) const {
    if (!launcher_.plan)
      return forward_by_steps(call_, first, gates[0], results, launcher_.device.stream);
    ForwardLaunch launch{launcher_.extent, call_.save, {}};
    for (int64_t i = 0; i < together(); ++i)
      launch.direction[i] = direction(first + i, gates[i], results);
    launcher_.launch(launch);
  }

 private:
  ForwardDirection direction(int64_t d, const at::Tensor& gates, const Results& results) const {
    const Layer& layer = call_.layer;
    const Weights& w = layer.weights[d];
    return {.weight_hh = data(w.hh),
            .bias_ih = data(w.bias_ih),
            .bias_hh = data(w.bias_hh),
            .h_0 = part(call_.h_0, d),
            .c_0 = part(call_.c_0, d),
            .gates = data(gates),
            .cells = part(results.cells, d),
            .output = columns(results.output, d * layer.P),
            .output_stride = int32_t(layer.directions * layer.P),
            .h_n = part(results.h_n, d),
            .c_n = part(results.c_n, d),
            .reverse = d == 1};
  }

  const ForwardCall& call_;
  const Launcher launcher_;
};

class BackwardRecurrence {
 public:
  explicit BackwardRecurrence(const BackwardCall& call) : call_(call), launcher_(call, kBackward) {}

  int64_t together() const { return launcher_.together(); }
  int64_t padded_units() const {
    const int64_t H = call_.layer.H;
    return launcher_.plan ? cuda::padded_units(launcher_.plan->operands, int(H)) : H;
  }
  at::Tensor upload(const std::vector<RowRun>& runs) const {
    return to_device(runs, call_.options, launcher_.device.stream);
  }

  void run(int64_t first, const RecurrenceGradients& found) const {
    if (!launcher_.plan) return backward_by_steps(call_, first, found, launcher_.device.stream);
    BackwardLaunch launch{launcher_.extent, {}};
    for (int64_t i = 0; i < together(); ++i) launch.direction[i] = direction(first + i, i, found);
    launcher_.launch(launch);
  }

 private:
  BackwardDirection direction(int64_t d, int64_t i, const RecurrenceGradients& found) const {
    const Layer& layer = call_.layer;
    const at::Tensor& dy = call_.grad_output;
    return {.weight_hh = data(layer.weights[d].hh),
            .grad_output = columns(dy, d * layer.P),
            .grad_output_stride_t = dy.defined() ? dy.stride(0) : 0,
            .grad_output_stride_b = dy.defined() ? dy.stride(layer.packed ? 0 : 1) : 0,
            .grad_h_n = part(call_.grad_h_n, d),
            .grad_c_n = part(call_.grad_c_n, d),
            .c_0 = part(call_.c_0, d),
            .gates = part(call_.gates, d),
            .cells = part(call_.cells, d),
            .dgates = part(found.dgates, i),
            .grad_c_0 = part(found.grad_c_0, i),
            .reverse = d == 1};
  }

  const BackwardCall& call_;
  const Launcher launcher_;
};

bool is_single(const LayerCall& call) {
  const Layer& layer = call.layer;
  const int64_t bytes = 4 * layer.H * (layer.I + layer.H) * call.input.element_size();
  return !layer.projected && cuda::is_single(layer.T, layer.B, bytes);
}

Results forward_single(const ForwardCall& call) {
  const Layer& layer = call.layer;
  const CurrentDevice device(call.input);
  const Results results(call, empty);
  SingleStep step{call.dtype,
                  int32_t(layer.B),
                  int32_t(layer.I),
                  int32_t(layer.H),
                  data(call.input),
                  call.input.stride(layer.packed ? 0 : 1),
                  layer.directions * layer.H,
                  int32_t(layer.directions),
                  {}};
  for (int64_t d = 0; d < layer.directions; ++d) {
    const Weights& w = layer.weights[d];
    step.direction[d] = {.weight_ih = data(w.ih),
                         .weight_hh = data(w.hh),
                         .bias_ih = data(w.bias_ih),
                         .bias_hh = data(w.bias_hh),
                         .h_0 = part(call.h_0, d),
                         .c_0 = part(call.c_0, d),
                         .output = columns(results.output, d * layer.H),
                         .h_n = part(results.h_n, d),
                         .c_n = part(results.c_n, d),
                         .gates = part(results.gates, d),
                         .cells = part(results.cells, d)};
  }
  check(run(step, device.stream));
  return results;
}

Results forward(const ForwardCall& call) {
  return is_single(call) ? forward_single(call) : forward_by<ForwardRecurrence>(call);
}

using Implementation = Operators<forward, backward_by<BackwardRecurrence>>;

}  // namespace

#ifdef FUSED_LSTM_EMULATION
TORCH_LIBRARY(fused_lstm_emulation, m) {
  for (const std::string& schema : schemas()) m.def(schema.c_str());
}
TORCH_LIBRARY_IMPL(fused_lstm_emulation, CPU, m) { Implementation::implement(m); }
#else
TORCH_LIBRARY_IMPL(fused_lstm, CUDA, m) { Implementation::implement(m); }
#endif

}  // namespace fused_lstm::cuda
