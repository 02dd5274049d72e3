// The operators' calls, unpacked and checked once for every backend. A backend writes
//   Results forward(const ForwardCall&);  LayerGradients backward(const BackwardCall&);
// and registers Operators<forward, backward>.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "dtypes.h"
#include "layer.h"
#include "lstm.h"
#include "schemas.h"

namespace fused_lstm {

inline Dtype dtype_of(const at::Tensor& t) {
  const std::optional<Dtype> found = dtype_of(t.scalar_type());
  TORCH_CHECK(found, "fused_lstm: the kernels take float32, float64, bfloat16 and float16, got ",
              t.scalar_type(), ": use backend(\"reference\")");
  return *found;
}

// Uninitialised.
inline at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::empty(shape, options);
}

inline at::Tensor dense_rows(const at::Tensor& t) {
  return !t.defined() || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

inline at::Tensor contiguous(const at::Tensor& t) { return t.defined() ? t.contiguous() : t; }

// (directions, ...) buffers: the part of direction d, null where there is none.
inline void* part(const at::Tensor& t, int64_t d) {
  return t.defined() ? static_cast<char*>(t.data_ptr()) + d * t.stride(0) * t.element_size()
                     : nullptr;
}

// (rows, D * P) tensors: from `column` on.
inline void* columns(const at::Tensor& t, int64_t column) {
  return t.defined() ? static_cast<char*>(t.data_ptr()) + column * t.element_size() : nullptr;
}

inline void* data(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

inline at::Tensor value(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }

inline Sequence sequence_of(const Layer& layer, int64_t d) {
  return {.T = layer.T,
          .B = layer.B,
          .I = layer.I,
          .H = layer.H,
          .P = layer.P,
          .batch_sizes = layer.packed ? layer.batch_sizes.data() : nullptr,
          .offsets = layer.packed ? layer.offsets.data() : nullptr,
          .reverse = d == 1,
          .projected = layer.projected};
}

// What both passes take: the weights, states and ids are contiguous, an input's last dimension is
// dense.
struct LayerCall {
  Layer layer;
  Dtype dtype;
  at::TensorOptions options;
  at::Tensor input, h_0, c_0;

  LayerCall(const at::Tensor& given, const std::optional<at::Tensor>& batch_sizes,
            const at::Tensor& given_h_0, const at::Tensor& given_c_0, at::TensorList weights)
      : layer(given, batch_sizes, given_h_0, given_c_0, weights),
        dtype(dtype_of(given_h_0)),
        options(given_h_0.options()),
        input(layer.ids ? given.contiguous() : dense_rows(given)),
        h_0(given_h_0.contiguous()),
        c_0(given_c_0.contiguous()) {
    for (Weights& w : layer.weights)
      w = {contiguous(w.ih), contiguous(w.hh), contiguous(w.bias_ih), contiguous(w.bias_hh),
           contiguous(w.hr)};
  }

  // Of the output: the input's, but for the last dimension.
  std::vector<int64_t> output_shape() const {
    std::vector<int64_t> shape = input.sizes().vec();
    if (layer.ids) shape.push_back(0);
    shape.back() = layer.directions * layer.P;
    return shape;
  }
};

struct ForwardCall : LayerCall {
  bool save;  // gates and cells, for the backward

  ForwardCall(const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes,
              const at::Tensor& h_0, const at::Tensor& c_0, at::TensorList weights, bool wanted)
      : LayerCall(input, batch_sizes, h_0, c_0, weights), save(wanted) {}
};

struct Results {
  at::Tensor output, h_n, c_n;
  at::Tensor gates, cells;  // undefined where not saved

  // Uninitialised, from allocate(shape, options).
  template <class Allocate>
  Results(const ForwardCall& call, const Allocate& allocate) {
    const Layer& layer = call.layer;
    output = allocate(call.output_shape(), call.options);
    h_n = at::empty(call.h_0.sizes(), call.options);
    c_n = at::empty(call.c_0.sizes(), call.options);
    if (!call.save) return;
    gates = allocate({layer.directions, layer.N, 4 * layer.H}, call.options);
    cells = allocate({layer.directions, layer.N, layer.H}, call.options);
  }
};

struct BackwardCall : LayerCall {
  at::Tensor grad_output, grad_h_n, grad_c_n;  // undefined: zero
  at::Tensor output, gates, cells;
  std::vector<at::Tensor> flat_weights;
  std::vector<bool> needs;  // input, h_0, c_0, then the weights
  int64_t each;             // weights of a direction
  bool consume;             // gates may be written to

  BackwardCall(const std::optional<at::Tensor>& given_grad_output,
               const std::optional<at::Tensor>& given_grad_h_n,
               const std::optional<at::Tensor>& given_grad_c_n, const at::Tensor& input,
               const std::optional<at::Tensor>& batch_sizes, const at::Tensor& h_0,
               const at::Tensor& c_0, at::TensorList weights, const at::Tensor& given_output,
               const at::Tensor& given_gates, const at::Tensor& given_cells,
               const c10::List<bool>& given_needs, bool may_consume)
      : LayerCall(input, batch_sizes, h_0, c_0, weights),
        grad_output(dense_rows(value(given_grad_output))),
        grad_h_n(contiguous(value(given_grad_h_n))),
        grad_c_n(contiguous(value(given_grad_c_n))),
        output(given_output.contiguous()),
        gates(given_gates.contiguous()),
        cells(given_cells.contiguous()),
        flat_weights(weights.vec()),
        needs(given_needs.begin(), given_needs.end()),
        each(int64_t(weights.size()) / layer.directions),
        consume(may_consume) {
    TORCH_CHECK(needs.size() == 3 + weights.size(),
                "fused_lstm: needs must say it for input, h_0, c_0 and each of ", weights.size(),
                " weights, got ", needs.size());
    TORCH_CHECK(!layer.ids || !needs[0], "fused_lstm: ids have no gradient");
    const int64_t D = layer.directions;
    Layer::check(output, "output", output_shape(), h_0);
    Layer::check(gates, "gates", {D, layer.N, 4 * layer.H}, h_0);
    Layer::check(cells, "cells", {D, layer.N, layer.H}, h_0);
    if (grad_output.defined()) Layer::check(grad_output, "grad_output", output_shape(), h_0);
    if (grad_h_n.defined()) Layer::check(grad_h_n, "grad_h_n", h_0.sizes(), h_0);
    if (grad_c_n.defined()) Layer::check(grad_c_n, "grad_c_n", c_0.sizes(), h_0);
  }

  // Whether direction d's weight number w, in Weights' order of those present, wants a gradient.
  bool needs_weight(int64_t d, int64_t w) const { return needs[3 + d * each + w]; }
};

struct LayerGradients {
  at::Tensor input, h_0, c_0;
  std::vector<at::Tensor> weights;

  // from make(shape, options) where they are wanted, otherwise empty (0,).
  template <class Make>
  LayerGradients(const BackwardCall& call, const Make& make) {
    size_t index = 0;
    const auto gradient = [&](const at::Tensor& of) {
      return call.needs[index++] ? make(of.sizes(), call.options.dtype(of.scalar_type()))
                                 : at::empty({0}, call.options);
    };
    input = gradient(call.input);
    h_0 = gradient(call.h_0);
    c_0 = gradient(call.c_0);
    for (const at::Tensor& weight : call.flat_weights) weights.push_back(gradient(weight));
  }
};

// Buffers are plain memory to what runs below: no autograd, no casting.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

template <Results (*forward)(const ForwardCall&), LayerGradients (*backward)(const BackwardCall&)>
class Operators {
 public:
  static void implement(torch::Library& m) {
    m.impl("lstm_inference", &ForwardKernel<false, ForwardSignature<OutputAndStates>>::call);
    m.impl("lstm_forward", &ForwardKernel<true, ForwardSignature<OutputAndSaved>>::call);
    m.impl("lstm_backward", &BackwardKernel<false, BackwardSignature<const at::Tensor&>>::call);
    m.impl("lstm_backward_consuming", &BackwardKernel<true, BackwardSignature<at::Tensor&>>::call);
  }

 private:
  // An operator's kernel, with the arguments of its signature.
  template <bool save, class Signature>
  struct ForwardKernel;
  template <bool save, class Returns, class... Arguments>
  struct ForwardKernel<save, Returns(Arguments...)> {
    static Returns call(Arguments... arguments) {
      const BelowAutograd guard;
      const ForwardCall call(arguments..., save);
      // No rows means no sequences: nothing runs.
      const Results r = call.layer.N > 0 ? forward(call) : Results(call, empty);
      if constexpr (save)
        return {r.output, r.h_n, r.c_n, r.gates, r.cells};
      else
        return {r.output, r.h_n, r.c_n};
    }
  };

  template <bool consume, class Signature>
  struct BackwardKernel;
  template <bool consume, class... Arguments>
  struct BackwardKernel<consume, GradientTuple(Arguments...)> {
    static GradientTuple call(Arguments... arguments) {
      const BelowAutograd guard;
      const BackwardCall call(arguments..., consume);
      if (consume) call.gates.unsafeGetTensorImpl()->bump_version();  // for others that saved them
      // Without sequences a gradient is a sum of nothing.
      LayerGradients grads = call.layer.N > 0 ? backward(call) : LayerGradients(call, zeros);
      return {grads.input, grads.h_0, grads.c_0, std::move(grads.weights)};
    }
    static at::Tensor zeros(at::IntArrayRef shape, const at::TensorOptions& options) {
      return at::zeros(shape, options);
    }
  };
};

}  // namespace fused_lstm
