// The large products after the backward through time, on ATen, for every backend but the CPU's,
// which has kernels of its own (cpu/gradients.h).
#pragma once

#include <functional>
#include <vector>

#include "operators.h"

namespace fused_lstm {

// Copies runs to the call's device, as (runs, 2) int32, without waiting for it.
using Upload = std::function<at::Tensor(const std::vector<RowRun>&)>;

// The input as one matrix (N, I). A batch_first input of several steps and sequences is copied:
// its rows lie in the order of the batch, and the products take them in the order of time.
at::Tensor rows_of(const LayerCall& call);

// Of one direction: dgates to gradients. dgates is (N, 4, U): U is H, or more with zeros behind.
class Products {
 public:
  Products(const BackwardCall& call, int64_t d, const at::Tensor& dgates, const Upload& upload);

  // Fills in the wanted gradients of input, h_0, w_ih, w_hh and biases; x is rows_of(call).
  // Direction 1 adds to what direction 0 left in grads.input.
  void compute(const at::Tensor& x, LayerGradients& grads) const;
  // That of w_hr, if wanted, from RecurrenceGradients' (recurrence.h).
  void to_weight_hr(const at::Tensor& grad_projected, const at::Tensor& hidden,
                    LayerGradients& grads) const;

 private:
  bool wanted(int64_t weight) const { return call_.needs_weight(d_, weight); }
  at::Tensor& gradient(LayerGradients& grads, int64_t weight) const {
    return grads.weights[d_ * call_.each + weight];
  }
  at::Tensor spread(const at::Tensor& w) const;
  template <class Compute>
  void fill(const at::Tensor& grad, const Compute& compute) const;
  void to_input(const at::Tensor& grad) const;
  void to_h_0(at::Tensor grad) const;
  void to_weight_hh(at::Tensor sum) const;

  const BackwardCall& call_;
  const Layer& layer_;
  const Weights& w_;
  const int64_t d_, U_;
  const at::Tensor dgates_;  // (N, 4U)
  const Upload& upload_;
  at::Tensor starts_;  // (B) the row that each sequence of a packed batch starts with
};

}  // namespace fused_lstm
