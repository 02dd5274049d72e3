// The CPU kernels behind the operators: buffers out of tensors, then the kernel of the instruction
// set in use.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include "../operators.h"
#include "block_cache.h"
#include "threads.h"

namespace fused_lstm::cpu {

namespace {

Threads threads_for(const Layer& layer) {
  return {layer.N * 4 * layer.H * (layer.I + layer.P) * layer.directions,
          at::in_parallel_region() ? 1 : at::get_num_threads()};
}

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

Results forward(const ForwardCall& call) {
  const Layer& layer = call.layer;
  const int64_t D = layer.directions;
  Results results(call, buffer);
  Forward args[2];
  for (int64_t d = 0; d < D; ++d) {
    const Weights& w = layer.weights[d];
    Forward& a = args[d];
    a.seq = sequence_of(layer, d);
    a.input = data(call.input);
    a.input_stride_t = call.input.stride(0);
    a.input_stride_b = call.input.stride(layer.packed ? 0 : 1);
    a.weight_ih = data(w.ih);
    a.weight_hh = data(w.hh);
    a.bias_ih = data(w.bias_ih);
    a.bias_hh = data(w.bias_hh);
    a.weight_hr = data(w.hr);
    a.h_0 = part(call.h_0, d);
    a.c_0 = part(call.c_0, d);
    a.output = columns(results.output, d * layer.P);
    a.output_stride = D * layer.P;
    a.h_n = part(results.h_n, d);
    a.c_n = part(results.c_n, d);
    a.gates = part(results.gates, d);
    a.cells = part(results.cells, d);
  }
  const Kernel& kernel = active_kernel(call.dtype);
  threads_for(layer).run(kernel.forward_workspace, kernel.forward, args, int(D));
  return results;
}

LayerGradients backward(const BackwardCall& call) {
  const Layer& layer = call.layer;
  const int64_t D = layer.directions;
  LayerGradients grads(call, buffer);
  // written whether it is wanted or not
  const at::Tensor grad_c_0 = call.needs[2] ? grads.c_0 : at::empty(call.c_0.sizes(), call.options);
  // each cell's gates are read, for the last time, before its dgates are written
  const at::Tensor dgates =
      call.consume ? call.gates : buffer({D, layer.N, 4 * layer.H}, call.options);
  at::Tensor hidden, grad_projected;
  if (layer.projected) {
    hidden = buffer({D, layer.N, layer.H}, call.options);
    grad_projected = buffer({D, layer.N, layer.P}, call.options);
  }
  const at::Tensor& dy = call.grad_output;
  Backward back[2];
  Gradients products[2];
  for (int64_t d = 0; d < D; ++d) {
    const Weights& w = layer.weights[d];
    const int64_t column = d * layer.P;
    Backward& a = back[d];
    a.seq = sequence_of(layer, d);
    a.grad_output = columns(dy, column);
    a.grad_output_stride_t = dy.defined() ? dy.stride(0) : 0;
    a.grad_output_stride_b = dy.defined() ? dy.stride(layer.packed ? 0 : 1) : 0;
    a.grad_h_n = part(call.grad_h_n, d);
    a.grad_c_n = part(call.grad_c_n, d);
    a.weight_hh = data(w.hh);
    a.weight_hr = data(w.hr);
    a.c_0 = part(call.c_0, d);
    a.gates = part(call.gates, d);
    a.cells = part(call.cells, d);
    a.dgates = part(dgates, d);
    a.grad_h_0 = call.needs[1] ? part(grads.h_0, d) : nullptr;
    a.grad_c_0 = part(grad_c_0, d);
    a.hidden = part(hidden, d);
    a.grad_projected = part(grad_projected, d);

    const auto target = [&](int64_t index) {
      return call.needs_weight(d, index) ? data(grads.weights[d * call.each + index]) : nullptr;
    };
    Gradients& g = products[d];
    g.seq = a.seq;
    g.dgates = a.dgates;
    g.input = data(call.input);
    g.input_stride_t = call.input.stride(0);
    g.input_stride_b = call.input.stride(layer.packed ? 0 : 1);
    g.h_0 = part(call.h_0, d);
    g.output = columns(call.output, column);
    g.output_stride = D * layer.P;
    g.weight_ih = data(w.ih);
    g.hidden = a.hidden;
    g.grad_projected = a.grad_projected;
    g.grad_input = call.needs[0] ? data(grads.input) : nullptr;
    g.grad_weight_ih = target(0);
    g.grad_weight_hh = target(1);
    g.grad_bias = !layer.biased ? nullptr : target(2) ? target(2) : target(3);
    g.grad_weight_hr = layer.projected ? target(call.each - 1) : nullptr;
  }
  const Kernel& kernel = active_kernel(call.dtype);
  const Threads threads = threads_for(layer);
  threads.run(kernel.backward_workspace, kernel.backward, back, int(D));
  threads.run(kernel.gradients_workspace, kernel.gradients, products, int(D));
  for (int64_t d = 0; layer.biased && d < D; ++d)
    if (call.needs_weight(d, 2) && call.needs_weight(d, 3))
      grads.weights[d * call.each + 3].copy_(grads.weights[d * call.each + 2]);
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_lstm, CPU, m) { Operators<forward, backward>::implement(m); }

}  // namespace fused_lstm::cpu
