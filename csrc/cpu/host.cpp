// The CPU kernels behind the operators: buffers out of tensors, then the kernel of the instruction
// set in use.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include <algorithm>

#include "../operators.h"
#include "block_cache.h"
#include "threads.h"

namespace fused_lstm::cpu {

namespace {

// Of direction d; its ids are looked at here.
Sequence sequence_on(const LayerCall& call, int64_t d) {
  const Layer& layer = call.layer;
  Sequence seq = sequence_of(layer, d);
  if (!layer.ids) return seq;
  seq.ids = call.input.const_data_ptr<int64_t>();
  int64_t least = 0, most = 0;
  for (int64_t n = 0; n < layer.N; ++n) {
    least = std::min(least, seq.ids[n]);
    most = std::max(most, seq.ids[n]);
  }
  TORCH_CHECK_INDEX(least >= 0 && most < layer.I, "index out of range in self");  // nn.Embedding's
  return seq;
}

// Multiply-adds of a layer of this one's shape, but with so many inputs.
int64_t products_of(const Layer& layer, int64_t inputs) {
  return layer.N * 4 * layer.H * (inputs + layer.P) * layer.directions;
}
int64_t products_of(const Layer& layer) { return products_of(layer, layer.ids ? 0 : layer.I); }

Threads threads_for(int64_t products) {
  return {products, at::in_parallel_region() ? 1 : at::get_num_threads()};
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

// One for each direction.
void describe(const ForwardCall& call, const Results& results, Forward* args) {
  const Layer& layer = call.layer;
  const int64_t D = layer.directions;
  for (int64_t d = 0; d < D; ++d) {
    const Weights& w = layer.weights[d];
    Forward& a = args[d];
    a.seq = sequence_on(call, d);
    a.input = layer.ids ? nullptr : data(call.input);
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
}

Results forward_on(const Threads& threads, const ForwardCall& call) {
  Results results(call, buffer);
  Forward args[2];
  describe(call, results, args);
  const Kernel& kernel = active_kernel(call.dtype);
  threads.run(kernel.forward_workspace, kernel.forward, args, int(call.layer.directions));
  return results;
}

Results forward(const ForwardCall& call) {
  return forward_on(threads_for(products_of(call.layer)), call);
}

// A stack of layers, one after the other or at once.
class Stack {
 public:
  Stack(const Optional& batch_sizes, const at::Tensor& h_0, const at::Tensor& c_0,
        at::TensorList weights, int64_t layers)
      : batch_sizes_(batch_sizes), h_0_(h_0), c_0_(c_0), weights_(weights), layers_(layers) {
    TORCH_CHECK(layers > 0 && weights.size() % size_t(layers) == 0 && h_0.dim() == 3 &&
                    c_0.dim() == 3 && h_0.size(0) % layers == 0 && h_0.size(0) == c_0.size(0),
                "fused_lstm: expected for ", layers,
                " layers h_0 (L*D, B, P), c_0 (L*D, B, H) and as many weights for each, got ",
                h_0.sizes(), ", ", c_0.sizes(), " and ", weights.size(), " weights");
  }

  OutputAndStates infer(const at::Tensor& input) {
    ForwardCall call = call_of(0, input);
    const Layer& first = call.layer;
    const int64_t D = first.directions;
    const int64_t above = (layers_ - 1) * products_of(first, D * first.P);
    const Threads threads = threads_for(products_of(first) + above);
    const Kernel& kernel = active_kernel(call.dtype);
    const bool at_once =
        first.N > 0 && D == 1 &&
        kernel.wavefront_pays(sequence_of(first, 0), int(layers_), threads.count());
    const at::Tensor output = at_once ? infer_at_once(std::move(call), kernel, threads)
                                      : infer_each(std::move(call), threads);
    return {output, at::cat(h_n_), at::cat(c_n_)};
  }

 private:
  ForwardCall call_of(int64_t l, const at::Tensor& input) const {
    const int64_t D = h_0_.size(0) / layers_;
    const size_t each = weights_.size() / size_t(layers_);
    return {input,
            batch_sizes_,
            h_0_.narrow(0, l * D, D),
            c_0_.narrow(0, l * D, D),
            weights_.slice(size_t(l) * each, each),
            false};
  }

  at::Tensor keep(const Results& results) {
    h_n_.push_back(results.h_n);
    c_n_.push_back(results.c_n);
    return results.output;
  }

  at::Tensor infer_each(ForwardCall call, const Threads& threads) {
    for (int64_t l = 1;; ++l) {
      const bool empty_batch = call.layer.N == 0;
      const at::Tensor output =
          keep(empty_batch ? Results(call, empty) : forward_on(threads, call));
      if (l == layers_) return output;
      call = call_of(l, output);
    }
  }

  at::Tensor infer_at_once(ForwardCall call, const Kernel& kernel, const Threads& threads) {
    std::vector<ForwardCall> calls;  // whose layers the arguments point to
    std::vector<Forward> args(size_t(layers_), Forward{});
    calls.reserve(args.size());
    calls.push_back(std::move(call));
    at::Tensor output;
    for (int64_t l = 0; l < layers_; ++l) {
      if (l > 0) calls.push_back(call_of(l, output));
      const Results results(calls.back(), buffer);
      output = keep(results);
      describe(calls.back(), results, &args[size_t(l)]);
    }
    threads.run(kernel.wavefront_workspace, kernel.wavefront, args.data(), int(layers_));
    return output;
  }

  const Optional& batch_sizes_;
  const at::Tensor &h_0_, &c_0_;
  const at::TensorList weights_;
  const int64_t layers_;
  std::vector<at::Tensor> h_n_, c_n_;
};

OutputAndStates stack_inference(const at::Tensor& input, const Optional& batch_sizes,
                                const at::Tensor& h_0, const at::Tensor& c_0,
                                at::TensorList weights, int64_t layers) {
  const BelowAutograd guard;
  return Stack(batch_sizes, h_0, c_0, weights, layers).infer(input);
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
    a.seq = sequence_on(call, d);
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
    g.input = layer.ids ? nullptr : data(call.input);
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
  const Threads threads = threads_for(products_of(layer));
  threads.run(kernel.backward_workspace, kernel.backward, back, int(D));
  threads.run(kernel.gradients_workspace, kernel.gradients, products, int(D));
  for (int64_t d = 0; layer.biased && d < D; ++d)
    if (call.needs_weight(d, 2) && call.needs_weight(d, 3))
      grads.weights[d * call.each + 3].copy_(grads.weights[d * call.each + 2]);
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_lstm, CPU, m) {
  Operators<forward, backward>::implement(m);
  m.impl("lstm_stack_inference", &stack_inference);
}

}  // namespace fused_lstm::cpu
