// What the host file asks of the CUDA kernels: plain structs, raw pointers, a stream. No torch.
//
// Shapes are those of ../lstm.h; every tensor is dense unless a stride says otherwise, strides
// count elements, and all of a call's tensors have one dtype. RowRun of a packed sequence are taken
// as they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lstm.h"
#include "launch.h"
#include "plan.h"

namespace fused_lstm::cuda {

struct Extent {
  int32_t T, B, H;
  int64_t N;            // rows in all
  const RowRun* steps;  // (T) each step's rows, on the device; null where every step has B rows
};

// --- the persistent path: one launch for all steps -----------------------------------------------
//
// A launch is not ../lstm.h's Forward or Backward: the sizes are 32 bits wide, for registers, the
// steps lie on the device, and x W_ih^T has gone before.

struct ForwardDirection {
  const void* weight_hh;  // (4H, H)
  const void* bias_ih;    // (4H), null without bias
  const void* bias_hh;    // (4H), null without bias
  const void* h_0;        // (B, H)
  const void* c_0;        // (B, H)
  void* gates;            // (N, 4H) in: x W_ih^T; out, where they are saved: activated gates
  void* cells;            // (N, H) c_t, null where nothing is saved
  void* output;           // (N, H), rows output_stride apart
  int32_t output_stride;
  void* h_n;  // (B, H)
  void* c_n;  // (B, H)
  bool reverse;
};

struct ForwardLaunch {
  Extent extent;
  bool save;  // gates and cells, for the backward
  ForwardDirection direction[2];
};

struct BackwardDirection {
  const void* weight_hh;         // (4H, H)
  const void* grad_output;       // (T, B, H) by strides, last dimension dense; null: zero
  int64_t grad_output_stride_t;  // unused when packed
  int64_t grad_output_stride_b;
  const void* grad_h_n;  // (B, H), null: zero
  const void* grad_c_n;  // (B, H), null: zero
  const void* c_0;       // (B, H)
  const void* gates;     // (N, 4H), as the forward saved them
  const void* cells;     // (N, H), as the forward saved them
  void* dgates;          // (N, 4, padded_units) out: gradient of the gates before their activation
  void* grad_c_0;        // (B, H) out
  bool reverse;
};

struct BackwardLaunch {
  Extent extent;
  BackwardDirection direction[2];
};

// plan() for the current device, and what the device itself says of how many blocks it holds: a
// plan that could not run all its blocks at once comes back not persistent. What the host file
// calls.
Plan choose(Pass pass, Operands operands, int T, int B, int H, int directions);

// Bytes of scratch memory, 256-byte aligned, for `directions` directions of a call.
size_t workspace_bytes(const Plan& plan, const Extent& extent);

// Enqueue a whole pass on the stream for plan.directions directions at a time; nothing is waited
// for and nothing is allocated. Null on success, else what went wrong.
const char* run(const Plan& plan, const ForwardLaunch& call, void* workspace, Stream stream);
const char* run(const Plan& plan, const BackwardLaunch& call, void* workspace, Stream stream);

// Copies runs of rows of a packed sequence to the device by way of kernel arguments: no pinned
// memory, no wait, and a captured graph keeps its own copy.
const char* upload(const RowRun* rows, int32_t count, RowRun* device_rows, Stream stream);

// --- one step of few rows: one launch ------------------------------------------------------------

struct SingleDirection {
  const void* weight_ih;  // (4H, I)
  const void* weight_hh;  // (4H, H)
  const void* bias_ih;    // (4H), null without bias
  const void* bias_hh;    // (4H), null without bias
  const void* h_0;        // (B, H)
  const void* c_0;        // (B, H)
  void* output;           // (B, H), rows output_stride apart
  void* h_n;              // (B, H)
  void* c_n;              // (B, H)
  void* gates;            // (B, 4H) activated, null where nothing is saved
  void* cells;            // (B, H), null where nothing is saved
};

struct SingleStep {
  Dtype dtype;
  int32_t B, I, H;    // B at most kMostSingleRows
  const void* input;  // (B, I), rows input_stride apart
  int64_t input_stride, output_stride;
  int32_t directions;
  SingleDirection direction[2];
};

const char* run(const SingleStep& step, Stream stream);

// --- the step path: a product by cuBLAS and one of these a step ----------------------------------

// The states h (B, P), c (B, H) are kept in place from step to step, c in float (double for
// double): rows that take no part in a step keep theirs.
struct ForwardStep {
  Dtype dtype;
  int64_t rows, H;
  void* gates;          // (rows, 4H) x W_ih^T + h W_hh^T in; activated gates out if `save`
  const void* bias_ih;  // (4H), null without bias
  const void* bias_hh;  // (4H), null without bias
  void* c;              // (B, H) float or double, in and out
  void* h;              // (rows, H) out: o tanh(c), rows h_stride apart
  int64_t h_stride;
  void* h_again;  // (B, H) out: the same, null where not wanted
  void* cells;    // (rows, H) c_t, null where nothing is saved
  bool save;
};

struct BackwardStep {
  Dtype dtype;
  int64_t rows, H;
  const void* gates;         // (rows, 4H)
  const void* cells;         // (rows, H)
  const void* cells_before;  // (continued, H) c_{t-1}; rows from `continued` on: c_0
  int64_t continued;
  const void* c_0;          // (B, H)
  const void* grad_output;  // (rows, H) rows grad_output_stride apart, null: zero
  int64_t grad_output_stride;
  const void* dh;  // (B, H) from the steps after, null: zero
  void* dc;        // (B, H) float or double, in and out
  void* dgates;    // (rows, 4H) out
  void* hidden;    // (rows, H) out: o tanh(c), null where not wanted
};

// sum = a + b (rows, columns), for projected states. No stride where there is none: rows are dense.
struct Sum {
  Dtype dtype;
  int64_t rows, columns;
  const void* a;  // rows a_stride apart, null: zero
  int64_t a_stride;
  const void* b;  // null: zero
  void* sum;      // rows sum_stride apart
  int64_t sum_stride;
};

const char* run(const ForwardStep& step, Stream stream);
const char* run(const BackwardStep& step, Stream stream);
const char* run(const Sum& sum, Stream stream);

// Whether the kernels were compiled for the current device.
bool usable();

}  // namespace fused_lstm::cuda
