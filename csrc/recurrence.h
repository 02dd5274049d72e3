// The operators of a backend that computes the recurrence only. The product of the input before it,
// those for the gradients after it, and the buffers between are the same for all of them.
//
// A backend writes two classes, constructed for one call:
//
//   struct ForwardRecurrence {
//     explicit ForwardRecurrence(const ForwardCall&);
//     int64_t together() const;  // directions that run at once: 1, or all
//     void run(int64_t first, const at::Tensor& gates, const Results&) const;
//   };
//   struct BackwardRecurrence {
//     explicit BackwardRecurrence(const BackwardCall&);
//     int64_t together() const;
//     int64_t padded_units() const;  // of a gate in dgates: H, or more with zeros behind
//     at::Tensor upload(const std::vector<RowRun>&) const;  // (runs, 2) int32, to the device
//     void run(int64_t first, const RecurrenceGradients&) const;
//   };
//
// run() serves the directions first, first + 1, ... first + together() - 1. `gates` (together, N,
// 4H) hold x W_ih^T; where they are to be saved they are the part of the results' for these
// directions, and hold the activated gates afterwards.
#pragma once

#include <ATen/ops/mm.h>

#include "products.h"

namespace fused_lstm {

// What the recurrence backward gives, all of it to be filled.
struct RecurrenceGradients {
  at::Tensor dgates;          // (together, N, 4, padded units), before the activation
  at::Tensor grad_c_0;        // (together, B, H)
  at::Tensor hidden;          // (together, N, H) o tanh(c); undefined without a projection
  at::Tensor grad_projected;  // (together, N, P) whole gradient of h_t; undefined likewise
};

template <class Recurrence>
Results forward_by(const ForwardCall& call) {
  const Layer& layer = call.layer;
  const Recurrence recurrence(call);
  const int64_t together = recurrence.together();
  const Results results(call, empty);
  const at::Tensor x = rows_of(call);
  // Directions that follow each other use the same buffer, where it isn't wanted afterwards.
  const at::Tensor buffers =
      call.save ? results.gates : at::empty({together, layer.N, 4 * layer.H}, call.options);
  for (int64_t first = 0; first < layer.directions; first += together) {
    const at::Tensor gates = buffers.narrow(0, call.save ? first : 0, together);
    for (int64_t d = 0; d < together; ++d) {
      at::Tensor product = gates.select(0, d);
      at::mm_out(product, x, layer.weights[first + d].ih.t());
    }
    recurrence.run(first, gates, results);
  }
  return results;
}

template <class Recurrence>
LayerGradients backward_by(const BackwardCall& call) {
  const Layer& layer = call.layer;
  const Recurrence recurrence(call);
  const int64_t together = recurrence.together(), U = recurrence.padded_units();
  LayerGradients grads(call, empty);
  // Written whether it is wanted or not.
  const at::Tensor grad_c_0 = call.needs[2] ? grads.c_0 : empty(call.c_0.sizes(), call.options);
  const at::Tensor x = rows_of(call);
  const Upload upload = [&](const std::vector<RowRun>& runs) { return recurrence.upload(runs); };
  for (int64_t first = 0; first < layer.directions; first += together) {
    RecurrenceGradients found;
    found.dgates = at::empty({together, layer.N, 4, U}, call.options);
    found.grad_c_0 = grad_c_0.narrow(0, first, together);
    if (layer.projected) {
      found.hidden = at::empty({together, layer.N, layer.H}, call.options);
      found.grad_projected = at::empty({together, layer.N, layer.P}, call.options);
    }
    recurrence.run(first, found);
    for (int64_t d = first; d < first + together; ++d) {
      const Products products(call, d, found.dgates.select(0, d - first), upload);
      products.compute(x, grads);
      if (layer.projected)
        products.to_weight_hr(found.grad_projected[d - first], found.hidden[d - first], grads);
    }
  }
  return grads;
}

}  // namespace fused_lstm
