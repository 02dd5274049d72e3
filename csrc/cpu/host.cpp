// The CPU kernels behind the operators: shapes and buffers out of tensors, then the kernel of the
// instruction set in use.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include "../layer.h"
#include "block_cache.h"
#include "dispatch.h"

namespace fused_lstm::cpu {
namespace {

// Buffers are plain memory to what runs below: no autograd, no casting.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK(false,
                  "fused_lstm: the CPU kernels take float32, float64, bfloat16 and float16, got ",
                  t.scalar_type(), ": use backend(\"reference\")");
  }
}

int thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// torch's way to memory from the block cache: tensors that own it, and can be resized like any
// other.
class CachedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new BlockCache::Block(BlockCache::instance().take(bytes));
    return {block->data, block, &release, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* context) {
    auto* block = static_cast<BlockCache::Block*>(context);
    BlockCache::instance().give(*block);
    delete block;
  }
};

// Uninitialised. Large ones come from the cache; the C library handles small ones well.
at::Tensor buffer(at::IntArrayRef shape, const at::TensorOptions& options) {
  static CachedAllocator* allocator = new CachedAllocator();
  constexpr size_t kCached = 256 << 10;
  const size_t bytes = size_t(c10::multiply_integers(shape)) * options.dtype().itemsize();
  if (bytes < kCached) return at::empty(shape, options);
  return at::detail::empty_generic(shape, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

// One block for each calling thread, as large as its largest call yet: mapping a few MB anew costs
// as much as a short sequence. Weights' size and a few rows, never T.
void* workspace(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  static thread_local std::vector<char> block;
  if (int64_t(block.size()) < bytes + kAlign) {
    block.clear();
    block.resize(size_t(bytes + kAlign));
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block.data()) + kAlign - 1) &
                                 ~uintptr_t(kAlign - 1));
}

at::Tensor dense_rows(const at::Tensor& t) {
  return !t.defined() || t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

Sequence sequence_of(const Layer& layer, int64_t d) {
  return {layer.T,
          layer.B,
          layer.I,
          layer.H,
          layer.P,
          layer.packed ? layer.batch_sizes.data() : nullptr,
          layer.packed ? layer.offsets.data() : nullptr,
          d == 1,
          layer.projected};
}

// (directions, ...) buffers: the part of direction d, null where there is none.
void* part(const at::Tensor& t, int64_t d) {
  return t.defined() ? static_cast<char*>(t.data_ptr()) + d * t.stride(0) * t.element_size()
                     : nullptr;
}

// (rows, D * P) tensors: from `column` on.
void* columns(const at::Tensor& t, int64_t column) {
  return t.defined() ? static_cast<char*>(t.data_ptr()) + column * t.element_size() : nullptr;
}

const void* data(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

at::Tensor contiguous(const at::Tensor& t) { return t.defined() ? t.contiguous() : t; }

std::vector<Weights> contiguous(const std::vector<Weights>& weights) {
  std::vector<Weights> dense;
  for (const Weights& w : weights)
    dense.push_back({contiguous(w.ih), contiguous(w.hh), contiguous(w.bias_ih),
                     contiguous(w.bias_hh), contiguous(w.hr)});
  return dense;
}

struct Result {
  at::Tensor output, h_n, c_n, gates, cells;
};

Result forward(const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes,
               const at::Tensor& h_0, const at::Tensor& c_0, at::TensorList flat_weights,
               bool save) {
  const BelowAutograd guard;
  const Layer layer(input, batch_sizes, h_0, c_0, flat_weights);
  const Dtype dtype = dtype_of(input);
  const at::TensorOptions options = input.options();
  const int64_t D = layer.directions, width = D * layer.P;
  Result result;
  result.output =
      layer.packed ? buffer({layer.N, width}, options) : buffer({layer.T, layer.B, width}, options);
  result.h_n = at::empty({D, layer.B, layer.P}, options);
  result.c_n = at::empty({D, layer.B, layer.H}, options);
  if (save) {
    result.gates = buffer({D, layer.N, 4 * layer.H}, options);
    result.cells = buffer({D, layer.N, layer.H}, options);
  }
  if (layer.N == 0) return result;

  const at::Tensor x = dense_rows(input), h = h_0.contiguous(), c = c_0.contiguous();
  const std::vector<Weights> weights = contiguous(layer.weights);
  Forward args[2];
  for (int64_t d = 0; d < D; ++d) {
    const Weights& w = weights[d];
    Forward& a = args[d];
    a.seq = sequence_of(layer, d);
    a.input = x.data_ptr();
    a.input_stride_t = x.stride(0);
    a.input_stride_b = layer.packed ? x.stride(0) : x.stride(1);
    a.weight_ih = data(w.ih);
    a.weight_hh = data(w.hh);
    a.bias_ih = data(w.bias_ih);
    a.bias_hh = data(w.bias_hh);
    a.weight_hr = data(w.hr);
    a.h_0 = part(h, d);
    a.c_0 = part(c, d);
    a.output = columns(result.output, d * layer.P);
    a.output_stride = width;
    a.h_n = part(result.h_n, d);
    a.c_n = part(result.c_n, d);
    a.gates = part(result.gates, d);
    a.cells = part(result.cells, d);
  }
  const Kernel& kernel = active_kernel(dtype);
  const int threads = thread_count();
  kernel.forward(args, int(D), threads, workspace(kernel.forward_workspace(args, int(D), threads)));
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_inference(
    const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes, const at::Tensor& h_0,
    const at::Tensor& c_0, at::TensorList weights) {
  Result r = forward(input, batch_sizes, h_0, c_0, weights, false);
  return {r.output, r.h_n, r.c_n};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> lstm_forward(
    const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes, const at::Tensor& h_0,
    const at::Tensor& c_0, at::TensorList weights) {
  Result r = forward(input, batch_sizes, h_0, c_0, weights, true);
  return {r.output, r.h_n, r.c_n, r.gates, r.cells};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_backward(
    const std::optional<at::Tensor>& maybe_grad_output,
    const std::optional<at::Tensor>& maybe_grad_h_n,
    const std::optional<at::Tensor>& maybe_grad_c_n, const at::Tensor& input,
    const std::optional<at::Tensor>& batch_sizes, const at::Tensor& h_0, const at::Tensor& c_0,
    at::TensorList flat_weights, const at::Tensor& output, const at::Tensor& gates,
    const at::Tensor& cells, c10::List<bool> needs) {
  const BelowAutograd guard;
  const Layer layer(input, batch_sizes, h_0, c_0, flat_weights);
  TORCH_CHECK(needs.size() == 3 + flat_weights.size(),
              "fused_lstm: needs must say it for input, h_0, c_0 and each of ", flat_weights.size(),
              " weights, got ", needs.size());
  const Dtype dtype = dtype_of(input);
  const at::TensorOptions options = input.options();
  const at::Tensor grad_output = maybe_grad_output.value_or(at::Tensor());
  const at::Tensor grad_h_n = maybe_grad_h_n.value_or(at::Tensor()),
                   grad_c_n = maybe_grad_c_n.value_or(at::Tensor());
  const int64_t D = layer.directions;
  const auto rows = input.sizes().slice(0, input.dim() - 1);
  std::vector<int64_t> output_shape(rows.begin(), rows.end());
  output_shape.push_back(D * layer.P);
  Layer::check(output, "output", output_shape, input);
  Layer::check(gates, "gates", {D, layer.N, 4 * layer.H}, input);
  Layer::check(cells, "cells", {D, layer.N, layer.H}, input);
  if (grad_output.defined()) Layer::check(grad_output, "grad_output", output_shape, input);
  if (grad_h_n.defined()) Layer::check(grad_h_n, "grad_h_n", h_0.sizes(), input);
  if (grad_c_n.defined()) Layer::check(grad_c_n, "grad_c_n", c_0.sizes(), input);
  // N == 0 is B == 0: nothing runs, and the weights' gradients are sums of nothing
  auto wanted = [&](bool need, at::IntArrayRef shape) {
    return !need     ? at::empty({0}, options)
           : layer.N ? buffer(shape, options)
                     : at::zeros(shape, options);
  };
  const int64_t each = int64_t(flat_weights.size()) / D;
  const at::Tensor grad_input = wanted(needs[0], input.sizes());
  const at::Tensor grad_h_0 = at::empty_like(h_0, at::MemoryFormat::Contiguous);
  const at::Tensor grad_c_0 = at::empty_like(c_0, at::MemoryFormat::Contiguous);
  std::vector<at::Tensor> grad_weights;
  for (size_t w = 0; w < flat_weights.size(); ++w)
    grad_weights.push_back(wanted(needs[3 + w], flat_weights[w].sizes()));

  if (layer.N > 0) {
    const at::Tensor dgates = buffer({D, layer.N, 4 * layer.H}, options);
    at::Tensor hidden, grad_projected;
    if (layer.projected) {
      hidden = buffer({D, layer.N, layer.H}, options);
      grad_projected = buffer({D, layer.N, layer.P}, options);
    }
    const at::Tensor dy = dense_rows(grad_output), dh = contiguous(grad_h_n),
                     dc = contiguous(grad_c_n);
    const at::Tensor x = dense_rows(input), h = h_0.contiguous(), c = c_0.contiguous(),
                     y = output.contiguous();
    const at::Tensor saved_gates = gates.contiguous(), saved_cells = cells.contiguous();
    const std::vector<Weights> weights = contiguous(layer.weights);
    Backward back[2];
    Gradients products[2];
    for (int64_t d = 0; d < D; ++d) {
      const int64_t column = d * layer.P;
      Backward& a = back[d];
      a.seq = sequence_of(layer, d);
      a.grad_output = columns(dy, column);
      a.grad_output_stride_t = dy.defined() ? dy.stride(0) : 0;
      a.grad_output_stride_b = dy.defined() ? dy.stride(layer.packed ? 0 : 1) : 0;
      a.grad_h_n = part(dh, d);
      a.grad_c_n = part(dc, d);
      a.weight_hh = data(weights[d].hh);
      a.weight_hr = data(weights[d].hr);
      a.c_0 = part(c, d);
      a.gates = part(saved_gates, d);
      a.cells = part(saved_cells, d);
      a.dgates = part(dgates, d);
      a.grad_h_0 = needs[1] ? part(grad_h_0, d) : nullptr;
      a.grad_c_0 = part(grad_c_0, d);
      a.hidden = part(hidden, d);
      a.grad_projected = part(grad_projected, d);

      const int64_t first = d * each;
      auto target = [&](int64_t w) {
        return needs[3 + first + w] ? grad_weights[first + w].data_ptr() : nullptr;
      };
      Gradients& g = products[d];
      g.seq = a.seq;
      g.dgates = a.dgates;
      g.input = x.data_ptr();
      g.input_stride_t = x.stride(0);
      g.input_stride_b = x.stride(layer.packed ? 0 : 1);
      g.h_0 = part(h, d);
      g.output = columns(y, column);
      g.output_stride = D * layer.P;
      g.weight_ih = data(weights[d].ih);
      g.hidden = a.hidden;
      g.grad_projected = a.grad_projected;
      g.grad_input = needs[0] ? grad_input.data_ptr() : nullptr;
      g.grad_weight_ih = target(0);
      g.grad_weight_hh = target(1);
      g.grad_bias = !layer.biased ? nullptr : target(2) ? target(2) : target(3);
      g.grad_weight_hr = layer.projected ? target(each - 1) : nullptr;
    }
    const Kernel& kernel = active_kernel(dtype);
    const int threads = thread_count();
    kernel.backward(back, int(D), threads,
                    workspace(kernel.backward_workspace(back, int(D), threads)));
    kernel.gradients(products, int(D), threads,
                     workspace(kernel.gradients_workspace(products, int(D), threads)));
    for (int64_t b = 2; layer.biased && b < int64_t(flat_weights.size()); b += each)
      if (needs[3 + b] && needs[4 + b])
        grad_weights[b + 1].copy_(grad_weights[b]);  // both biases are added to the gates
  }
  return {grad_input, needs[1] ? grad_h_0 : at::empty({0}, options),
          needs[2] ? grad_c_0 : at::empty({0}, options), std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_lstm, CPU, m) {
  m.impl("lstm_inference", &lstm_inference);
  m.impl("lstm_forward", &lstm_forward);
  m.impl("lstm_backward", &lstm_backward);
}

}  // namespace fused_lstm::cpu
