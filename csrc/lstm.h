// The contract that every compiled backend meets: one LSTM layer, one struct a direction.
//
//   gates = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh        (B, 4H), order i, f, g, o
//   c_t   = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)          (B, H)
//   h_t   = sigmoid(o) tanh(c_t)                             (B, H)
//   h_t   = h_t W_hr^T                                       (B, P), if projected
//
// as torch.nn.LSTM computes it. P is the projection's size, or H where there is none.
//
// A sequence has T steps of at most B rows. Packed, step t has batch_sizes[t] rows (non-increasing)
// which start at row offsets[t]; otherwise it has B rows and row (t, b) is t * B + b. N is the
// number of all rows. Pointers are to elements of the compute dtype (float, double, bfloat16,
// half); strides count elements. Cell state and sums are kept in float (double for double),
// whatever the compute dtype.
#pragma once

#include <cstdint>

namespace fused_lstm {

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

struct Sequence {
  int64_t T, B, I, H, P;
  const int64_t* batch_sizes;  // (T), null when not packed
  const int64_t* offsets;      // (T), null when not packed
  bool reverse;                // runs from step T - 1 to step 0
  bool projected;
  // (N), each below I: x is one-hot and given so, by its ones. The input is null then, its gradient
  // isn't wanted, and W_ih and its gradient are in the type of sums. Null: the input is given.
  const int64_t* ids = nullptr;

  // Of x, how many numbers a row of weights multiplies.
  int64_t multiplied() const { return ids ? 0 : I; }

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t first_row(int64_t t) const { return offsets ? offsets[t] : t * B; }
  int64_t step(int64_t s, bool backward) const { return reverse != backward ? T - 1 - s : s; }
  // The state before a row's step: with the step `before(t)`, in the direction's own order, the
  // first `continued(t)` rows of step t ended; the others begin here, with h_0 and c_0.
  int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  int64_t continued(int64_t t) const {
    const int64_t step = before(t);
    if (step < 0 || step >= T) return 0;
    return rows(step) < rows(t) ? rows(step) : rows(t);
  }
  // Where row (t, b) of a tensor lies that is given by strides.
  int64_t offset(int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) const {
    return offsets ? (offsets[t] + b) * stride_b : t * stride_t + b * stride_b;
  }
};

// Rows that follow each other, as a GPU takes them: how many, and which is the first.
struct RowRun {
  int32_t count, first;
};

struct Forward {
  Sequence seq;
  const void* input;       // (T, B, I) by strides, last dimension dense
  int64_t input_stride_t;  // unused when packed
  int64_t input_stride_b;
  const void* weight_ih;  // (4H, I)
  const void* weight_hh;  // (4H, P)
  const void* bias_ih;    // (4H), null without bias
  const void* bias_hh;    // (4H), null without bias
  const void* weight_hr;  // (P, H), null without projection
  const void* h_0;        // (B, P)
  const void* c_0;        // (B, H)
  void* output;           // (N, P), rows output_stride apart
  int64_t output_stride;
  void* h_n;    // (B, P)
  void* c_n;    // (B, H)
  void* gates;  // (N, 4H) activated gates for the backward, null when no gradient is wanted
  void* cells;  // (N, H) c_t for the backward, null when no gradient is wanted
};

struct Backward {
  Sequence seq;
  const void* grad_output;       // (T, B, P) by strides, last dimension dense; null: zero
  int64_t grad_output_stride_t;  // unused when packed
  int64_t grad_output_stride_b;
  const void* grad_h_n;   // (B, P), null: zero
  const void* grad_c_n;   // (B, H), null: zero
  const void* weight_hh;  // (4H, P)
  const void* weight_hr;  // (P, H), null without projection
  const void* c_0;        // (B, H)
  const void* gates;      // (N, 4H), as the forward saved them
  const void* cells;      // (N, H), as the forward saved them
  void* dgates;           // (N, 4H) out: gradient of the gates before the activation; may be gates
  void* grad_h_0;         // (B, P) out, null where not wanted: a step's product is saved
  void* grad_c_0;         // (B, H) out
  void* hidden;           // (N, H) out: o tanh(c), for the projection's gradient; null without it
  void* grad_projected;   // (N, P) out: whole gradient of h_t, for the same; null without it
};

// The large products after the backward through time; each output is null where no such gradient is
// wanted.
struct Gradients {
  Sequence seq;
  const void* dgates;      // (N, 4H)
  const void* input;       // (T, B, I) by strides, last dimension dense
  int64_t input_stride_t;  // unused when packed
  int64_t input_stride_b;
  const void* h_0;     // (B, P)
  const void* output;  // (N, P), rows output_stride apart
  int64_t output_stride;
  const void* weight_ih;       // (4H, I)
  const void* hidden;          // (N, H) from the backward, null without projection
  const void* grad_projected;  // (N, P) from the backward, null without projection
  void* grad_input;            // (N, I) dense, the sum over directions: the same for both
  void* grad_weight_ih;        // (4H, I)
  void* grad_weight_hh;        // (4H, P)
  void* grad_bias;             // (4H), either bias vector's
  void* grad_weight_hr;        // (P, H)
};

}  // namespace fused_lstm
