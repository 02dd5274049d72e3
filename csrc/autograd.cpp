// Eager calls as autograd records them: `lstm_recorded` is `lstm_forward` without gates and cells,
// and its node in the graph calls the backward operators of the same backend.
//
// fused_lstm/ops.py has the same formula for calls that are compiled or traced. torch.library's way
// to that one flattens its arguments as a tree, and costs as much as a short sequence; a
// torch.autograd.Function in Python is a quarter of one step with its backward (H 96).
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "schemas.h"

namespace fused_lstm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Forward = ForwardSignature<OutputAndSaved>;
using Backward = BackwardSignature<const Tensor&>;
using BackwardConsuming = BackwardSignature<Tensor&>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const std::string& library, const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((library + "::" + name).c_str(), "")
      .typed<Signature>();
}

// One backend's operators. The backward is of the backend that ran the forward.
struct Operators {
  c10::TypedOperatorHandle<Forward> forward;
  c10::TypedOperatorHandle<Backward> backward;
  c10::TypedOperatorHandle<BackwardConsuming> backward_consuming;
  c10::TypedOperatorHandle<Backward> backward_by_reference;

  explicit Operators(const std::string& library)
      : forward(find<Forward>(library, "lstm_forward")),
        backward(find<Backward>(library, "lstm_backward")),
        backward_consuming(find<BackwardConsuming>(library, "lstm_backward_consuming")),
        backward_by_reference(find<Backward>("fused_lstm", "lstm_backward_by_reference")) {}

  static const Operators& of(bool triton) {
    if (triton) {
      static const Operators operators("fused_lstm_triton");
      return operators;
    }
    static const Operators operators("fused_lstm");
    return operators;
  }
};

// Whether the backward is under vmap or another transform.
bool is_transformed(const variable_list& grads) {
  // of torch.func, whose header needs one that torch does not bring
  if (c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode))
    return true;
  for (const Tensor& grad : grads)  // by is_grads_batched=True, whose vmap is not torch.func's
    if (grad.defined() && at::isBatchedTensor(grad)) return true;
  return false;
}

}  // namespace

// Outside the unnamed namespace for its name, which grad_fn and the profiler show.
struct Recorded : torch::autograd::Function<Recorded> {
  // What is saved, the weights behind it.
  enum { kInput, kBatchSizes, kH0, kC0, kOutput, kGates, kCells, kWeights };

  static variable_list forward(AutogradContext* ctx, bool triton, const Optional* batch_sizes,
                               const Tensor& input, const Tensor& h_0, const Tensor& c_0,
                               at::TensorList weights) {
    const at::AutoDispatchBelowAutograd below;
    auto [output, h_n, c_n, gates, cells] =
        Operators::of(triton).forward.call(input, *batch_sizes, h_0, c_0, weights);
    ctx->set_materialize_grads(false);
    ctx->saved_data["triton"] = triton;
    // hooks hand out what they like: a tensor that someone keeps, say
    ctx->saved_data["hooked"] = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    variable_list saved{input, batch_sizes->value_or(Tensor()), h_0, c_0, output, gates, cells};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    return {output, h_n, c_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list saved = ctx->get_saved_variables();
    const std::vector<Tensor> weights(saved.begin() + kWeights, saved.end());
    c10::List<bool> needs;
    for (size_t k = 0; k < 3 + weights.size(); ++k) needs.push_back(ctx->needs_input_grad(k));
    auto [of_input, of_h_0, of_c_0, of_weights] = gradients(ctx, grads, saved, weights, needs);
    // of recorded's arguments: none of triton and batch_sizes
    variable_list found{Tensor(), Tensor(), of_input, of_h_0, of_c_0};
    found.insert(found.end(), of_weights.begin(), of_weights.end());
    for (size_t k = 0; k < needs.size(); ++k)
      if (!needs[k]) found[2 + k] = Tensor();
    return found;
  }

  static GradientTuple gradients(AutogradContext* ctx, const variable_list& grads,
                                 variable_list& saved, const std::vector<Tensor>& weights,
                                 const c10::List<bool>& needs) {
    const Operators& operators = Operators::of(ctx->saved_data["triton"].toBool());
    const auto optional = [](const Tensor& t) { return t.defined() ? Optional(t) : Optional(); };
    const auto give = [&](const auto& backward, const Tensor& output) {
      return backward(optional(grads[0]), optional(grads[1]), optional(grads[2]), saved[kInput],
                      optional(saved[kBatchSizes]), saved[kH0], saved[kC0], weights, output,
                      saved[kGates], saved[kCells], needs);
    };
    // Its kernel itself: dispatching the operator would apply the transforms to it.
    if (is_transformed(grads))
      return give(
          [&](const auto&... arguments) {
            return operators.backward_by_reference.redispatch(
                c10::DispatchKeySet(c10::DispatchKey::CPU), arguments...);
          },
          saved[kOutput]);
    const auto call = [&](const auto& backward, const Tensor& output) {
      return give([&](auto&&... arguments) { return backward.call(arguments...); }, output);
    };
    // Gradients to be differentiated again recompute the output: what depends on it does not pass
    // through its own node.
    if (at::GradMode::is_enabled()) return call(operators.backward, saved[kOutput].detach());
    const at::AutoDispatchBelowAutograd below;
    return may_consume(ctx, saved[kGates]) ? call(operators.backward_consuming, saved[kOutput])
                                           : call(operators.backward, saved[kOutput]);
  }

  // Whether the gates may be overwritten: the graph is freed after this, and nobody but it (and
  // this call) refers to them or to their memory. A backward in another thread that comes before
  // the graph is freed waits for this one, and then fails on the gates' version.
  static bool may_consume(AutogradContext* ctx, const Tensor& gates) {
    return !torch::autograd::get_current_graph_task_keep_graph() &&
           !ctx->saved_data["hooked"].toBool() && gates.use_count() == 2 &&
           gates.storage().use_count() == 1;
  }
};

namespace {

OutputAndStates recorded(bool triton, const Tensor& input, const Optional& batch_sizes,
                         const Tensor& h_0, const Tensor& c_0, at::TensorList weights) {
  variable_list results = Recorded::apply(triton, &batch_sizes, input, h_0, c_0, weights);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lstm, m) {
  // lstm_forward, Triton's or the compiled one, without gates and cells.
  m.def(("lstm_recorded(bool triton, " + kLayerArguments + ") -> (Tensor output, Tensor h_n, " +
         "Tensor c_n)")
            .c_str(),
        &recorded);
  // lstm_backward under a transform, implemented in Python (fused_lstm/ops.py).
  m.def(backward_schema("lstm_backward_by_reference", "Tensor").c_str());
}

}  // namespace fused_lstm
