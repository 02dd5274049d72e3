// The CUDA kernels behind the operators: which path serves a call, buffers out of tensors, and the
// large products before and after the time loop.
//
// Nothing here waits for the GPU, and the lengths of packed sequences reach it as arguments of
// kernels, so that a call can be captured in a CUDA graph.
#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <limits>

#include "kernels.h"
#include "plan.h"
#include "steps.h"
#include "torch_device.h"

#ifdef FUSED_LSTM_EMULATION
#include "../schemas.h"
#endif

namespace fused_lstm::cuda {
namespace {

at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::empty(shape, options);
}

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

// Sizes as the kernels take them. The steps of packed rows are copied to the device, and kept here.
struct DeviceExtent {
  at::Tensor steps;
  Extent extent;

  DeviceExtent(const LayerCall& call, Stream stream) {
    const Layer& layer = call.layer;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(layer.N <= kMost && 4 * layer.H <= kMost,
                "fused_lstm: the CUDA kernels take up to 2^31 - 1 rows (steps times sequences) and "
                "2^29 - 1 hidden units, got ",
                layer.N, " and ", layer.H);
    extent = {int32_t(layer.T), int32_t(layer.B), int32_t(layer.H), layer.N, nullptr};
    if (!layer.packed) return;
    std::vector<Rows> rows;
    for (int64_t t = 0; t < layer.T; ++t)
      rows.push_back({int32_t(layer.batch_sizes[t]), int32_t(layer.offsets[t])});
    steps = at::empty({layer.T, 2}, call.options.dtype(at::kInt));
    static_assert(sizeof(Rows) == 2 * sizeof(int32_t));
    auto* const device_rows = static_cast<Rows*>(steps.data_ptr());
    check(upload(rows.data(), extent.T, device_rows, stream));
    extent.steps = device_rows;
  }
};

// Enqueues a pass with scratch memory of its own.
template <class Pass>
void launch(const Plan& plan, const Pass& pass, const at::TensorOptions& options, Stream stream) {
  constexpr size_t kAlign = 256;
  const size_t bytes = workspace_bytes(plan, pass.extent);
  const at::Tensor block = at::empty({int64_t(bytes + kAlign)}, options.dtype(at::kByte));
  const auto address = reinterpret_cast<uintptr_t>(block.data_ptr());
  check(run(plan, pass, reinterpret_cast<void*>((address + kAlign - 1) & ~(kAlign - 1)), stream));
}

// The input as one matrix (N, I). A batch_first input of several steps and sequences is copied:
// its rows lie in the order of the batch, and the kernels take those of the products in the order
// of time.
at::Tensor rows_of(const LayerCall& call) {
  return call.input.reshape({call.layer.N, call.layer.I});
}

ForwardDirection forward_direction(const ForwardCall& call, int64_t d, const at::Tensor& gates,
                                   const Results& results) {
  const Layer& layer = call.layer;
  const Weights& w = layer.weights[d];
  return {data(w.hh),
          data(w.bias_ih),
          data(w.bias_hh),
          part(call.h_0, d),
          part(call.c_0, d),
          data(gates),
          part(results.cells, d),
          columns(results.output, d * layer.P),
          int32_t(layer.directions * layer.P),
          part(results.h_n, d),
          part(results.c_n, d),
          d == 1};
}

Results forward(const ForwardCall& call) {
  const Layer& layer = call.layer;
  const CurrentDevice device(call.input);
  const DeviceExtent sizes(call, device.stream);
  Results results(call, empty);
  const std::optional<Plan> plan = plan_for(call, kForward);
  const int64_t together = plan ? plan->directions : 1;
  const at::Tensor x = rows_of(call);
  // Directions that follow each other use the same buffer, where it isn't wanted afterwards.
  const at::Tensor buffers =
      call.save ? results.gates : at::empty({together, layer.N, 4 * layer.H}, call.options);
  for (int64_t first = 0; first < layer.directions; first += together) {
    Forward pass{sizes.extent, call.save, {}};
    for (int64_t d = first; d < first + together; ++d) {
      at::Tensor gates = buffers.select(0, call.save ? d : d - first);
      at::mm_out(gates, x, layer.weights[d].ih.t());
      if (plan)
        pass.direction[d - first] = forward_direction(call, d, gates, results);
      else
        forward_by_steps(call, d, gates, results, device.stream);
    }
    if (plan) launch(*plan, pass, call.options, device.stream);
  }
  return results;
}

// The large products after the backward through time, of one direction: dgates to gradients.
class LargeProducts {
 public:
  // dgates is (N, 4, U): U is H, or more with zeros between.
  LargeProducts(const BackwardCall& call, int64_t d, const Extent& extent, const at::Tensor& dgates,
                Stream stream)
      : call_(call),
        layer_(call.layer),
        w_(call.layer.weights[d]),
        d_(d),
        U_(dgates.size(2)),
        extent_(extent),
        dgates_(dgates.view({call.layer.N, 4 * U_})),
        stream_(stream) {}

  // Fills what is wanted; x is the input (N, I). Direction 1 adds to what direction 0 left in
  // grads.input.
  void compute(const at::Tensor& x, LayerGradients& grads) const {
    if (call_.needs[0]) to_input(grads.input);
    if (call_.needs[1]) to_h_0(grads.h_0.select(0, d_));
    at::Tensor* const of = grads.weights.data() + d_ * call_.each;
    if (wanted(0)) fill(of[0], [&](at::Tensor sum) { at::mm_out(sum, dgates_.t(), x); });
    if (wanted(1)) fill(of[1], [&](at::Tensor sum) { to_weight_hh(sum); });
    if (!layer_.biased || !(wanted(2) || wanted(3))) return;
    at::Tensor& bias = of[wanted(2) ? 2 : 3];  // either bias vector's: both are added to the gates
    fill(bias, [&](at::Tensor sum) { at::sum_out(sum, dgates_, {0}); });
    if (wanted(2) && wanted(3)) of[3].copy_(of[2]);
  }

 private:
  bool wanted(int64_t weight) const { return call_.needs_weight(d_, weight); }

  // A weight's rows (4H, ...) with zeros between, as dgates' columns are.
  at::Tensor spread(const at::Tensor& w) const {
    if (U_ == layer_.H) return w;
    return at::constant_pad_nd(w.view({4, layer_.H, -1}), {0, 0, 0, U_ - layer_.H})
        .view({4 * U_, -1});
  }

  // grad (4H, ...) = what compute(sum) puts into sum (4U, ...).
  template <class Compute>
  void fill(const at::Tensor& grad, const Compute& compute) const {
    if (U_ == layer_.H) return compute(grad);
    std::vector<int64_t> shape = grad.sizes().vec();
    shape[0] = 4 * U_;
    const at::Tensor sum = at::empty(shape, call_.options);
    compute(sum);
    grad.view({4, layer_.H, -1}).copy_(sum.view({4, U_, -1}).narrow(1, 0, layer_.H));
  }

  void to_input(const at::Tensor& grad) const {
    at::Tensor dx = grad.view({layer_.N, layer_.I});
    if (d_ == 0)
      at::mm_out(dx, dgates_, spread(w_.ih));
    else
      at::addmm_out(dx, dx, dgates_, spread(w_.ih));
  }

  void to_h_0(at::Tensor grad) const {
    at::Tensor starts;  // the rows (B, 4U) of the step that each sequence starts with
    if (d_ == 0) {
      starts = dgates_.narrow(0, 0, layer_.B);
    } else if (!layer_.packed) {
      starts = dgates_.narrow(0, layer_.N - layer_.B, layer_.B);
    } else {
      starts = at::empty({layer_.B, 4 * U_}, call_.options);
      check(run(LastRows{call_.dtype, extent_, 4 * U_, data(dgates_), data(starts)}, stream_));
    }
    at::mm_out(grad, starts, spread(w_.hh));
  }

  // dgates^T times the states that the steps began with. Not packed, those are the output's rows
  // of the neighbouring step, and h_0.
  void to_weight_hh(at::Tensor sum) const {
    const int64_t N = layer_.N, B = layer_.B, P = layer_.P;
    const int64_t width = layer_.directions * P;
    const at::Tensor h_0 = call_.h_0.select(0, d_);
    if (layer_.packed) {
      const at::Tensor previous = at::empty({N, P}, call_.options);
      check(run(PreviousStates{call_.dtype, extent_, P, d_ == 1, columns(call_.output, d_ * P),
                               width, data(h_0), data(previous)},
                stream_));
      at::mm_out(sum, dgates_.t(), previous);
      return;
    }
    const at::Tensor output = call_.output.view({N, width}).narrow(1, d_ * P, P);
    const int64_t start = d_ == 0 ? 0 : N - B, others = d_ == 0 ? B : 0;
    at::mm_out(sum, dgates_.narrow(0, start, B).t(), h_0);
    if (N > B)
      at::addmm_out(sum, sum, dgates_.narrow(0, others, N - B).t(),
                    output.narrow(0, B - others, N - B));
  }

  const BackwardCall& call_;
  const Layer& layer_;
  const Weights& w_;
  const int64_t d_, U_;
  const Extent& extent_;
  const at::Tensor dgates_;  // (N, 4U)
  const Stream stream_;
};

BackwardDirection backward_direction(const BackwardCall& call, int64_t d, const at::Tensor& dgates,
                                     const at::Tensor& grad_c_0) {
  const Layer& layer = call.layer;
  const at::Tensor& dy = call.grad_output;
  return {data(layer.weights[d].hh),
          columns(dy, d * layer.P),
          dy.defined() ? dy.stride(0) : 0,
          dy.defined() ? dy.stride(layer.packed ? 0 : 1) : 0,
          part(call.grad_h_n, d),
          part(call.grad_c_n, d),
          part(call.c_0, d),
          part(call.gates, d),
          part(call.cells, d),
          data(dgates),
          part(grad_c_0, d),
          d == 1};
}

LayerGradients backward(const BackwardCall& call) {
  const Layer& layer = call.layer;
  const int64_t N = layer.N, H = layer.H, P = layer.P;
  const CurrentDevice device(call.input);
  const DeviceExtent sizes(call, device.stream);
  LayerGradients grads(call, empty);
  // written whether it is wanted or not
  const at::Tensor grad_c_0 = call.needs[2] ? grads.c_0 : empty(call.c_0.sizes(), call.options);
  const std::optional<Plan> plan = plan_for(call, kBackward);
  const int64_t together = plan ? plan->directions : 1;
  const int64_t U = plan ? padded_units(plan->operands, int(H)) : H;
  const at::Tensor x = rows_of(call);
  for (int64_t first = 0; first < layer.directions; first += together) {
    const at::Tensor dgates = at::empty({together, N, 4, U}, call.options);
    Backward pass{sizes.extent, {}};
    for (int64_t d = first; d < first + together; ++d) {
      if (plan) {
        pass.direction[d - first] =
            backward_direction(call, d, dgates.select(0, d - first), grad_c_0);
        continue;
      }
      at::Tensor hidden, grad_projected;
      if (layer.projected) {
        hidden = at::empty({N, H}, call.options);
        grad_projected = at::empty({N, P}, call.options);
      }
      backward_by_steps(call, d, dgates[0], grad_c_0.select(0, d), hidden, grad_projected,
                        device.stream);
      if (layer.projected && call.needs_weight(d, call.each - 1))
        at::mm_out(grads.weights[d * call.each + call.each - 1], grad_projected.t(), hidden);
    }
    if (plan) launch(*plan, pass, call.options, device.stream);
    for (int64_t d = first; d < first + together; ++d)
      LargeProducts(call, d, sizes.extent, dgates.select(0, d - first), device.stream)
          .compute(x, grads);
  }
  return grads;
}

}  // namespace

#ifdef FUSED_LSTM_EMULATION
TORCH_LIBRARY(fused_lstm_emulation, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
TORCH_LIBRARY_IMPL(fused_lstm_emulation, CPU, m) { Operators<forward, backward>::implement(m); }
#else
TORCH_LIBRARY_IMPL(fused_lstm, CUDA, m) { Operators<forward, backward>::implement(m); }
#endif

}  // namespace fused_lstm::cuda
