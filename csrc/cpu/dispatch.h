// The instruction sets that kernel.cpp was compiled for, and which of them is in use. No torch, no
// STL.
#pragma once

#include <cstdint>

#include "../lstm.h"

namespace fused_lstm::cpu {

// Who runs a pass.
struct Crew {
  int threads;
  bool patient = true;  // false, for tests: at their first meeting the last to come goes on alone
};

// How long a pass's threads waited for each other.
enum Waits {
  kShortWaits,
  kStalled,  // for longer than any share of a short pass's work takes
  kLost      // for longer than several threads save; one may have gone on alone
};

// --- streams: steps of a stack of layers, one direction, weights and states kept -----------------

struct StreamShape {
  int64_t L, B, I, H, P;  // L layers
  bool projected;

  // Multiply-adds of a step in the gates of all layers.
  int64_t gate_products() const { return B * 4 * H * (I + P + 2 * (L - 1) * P); }
};

// Of one layer as lstm.h has it. Matrices in the type that they are kept in (float for bytes),
// biases in the compute dtype.
struct StreamWeights {
  const void *ih, *hh, *bias_ih, *bias_hh, *hr;  // null where absent
};

// A stream of ids, which go in and out: a row of a table or an embedding goes into the first layer
// (whose I is 0 with a table), and a head makes scores of what comes out of the last.
struct StreamText {
  int64_t vocabulary;
  bool table;    // of x W_ih^T + b, else an embedding
  void* kept;    // all of it, 64-byte aligned, of the kernel's own layout
  int64_t* ids;  // (T + 1, B), of which the first `given` steps are given
  int64_t given;
  // Scores (B, vocabulary) after step t, from the last given one on: writes the next step's ids.
  // False: there is no next step.
  bool (*draw)(void* context, int64_t t, const double* scores);
  void* context;
};

struct StreamTextWeights {
  const void *head,
      *bias;          // (vocabulary, P), in the type that weights come in; (vocabulary), or null
  const void* table;  // (vocabulary, 4H), float (double for double), or null
  const void* embedding;  // (vocabulary, I), or null
};

// T steps. weights and state are 64-byte aligned and of the kernel's own layout.
struct StreamCall {
  StreamShape shape;
  void *weights, *state;
  int64_t current;  // steps taken since the state was zeroed, but for a multiple of 2
  int64_t T;
  const void* x;  // (T, B, I) by strides, last dimension dense
  int64_t x_stride_t, x_stride_b;
  void* y;  // (T, B, P) by strides, last dimension dense
  int64_t y_stride_t, y_stride_b;
  const StreamText* text;  // null: x goes in and y comes out
};

// The entry points for one compute dtype and one width of the weights; null where there are none.
struct StreamKernel {
  int64_t (*weight_bytes)(const StreamCall& call);
  int64_t (*state_bytes)(const StreamCall& call);
  int64_t (*text_bytes)(const StreamCall& call);
  void (*pack)(const StreamCall& call, int64_t layer, const StreamWeights& weights);
  void (*pack_text)(const StreamCall& call, const StreamTextWeights& weights);
  // h (L, B, P) and c (L, B, H) of the compute dtype, of rows [begin, end); null: zeros.
  void (*write)(const StreamCall& call, int64_t begin, int64_t end, const void* h, const void* c);
  void (*read)(const StreamCall& call, int64_t begin, int64_t end, void* h, void* c);
  int64_t (*workspace)(const StreamCall* call, int, int threads);
  Waits (*run)(const StreamCall* call, int, Crew crew, void* workspace);
};

enum StreamWidth { kOwnWidth, kBFloat16Weights, kInt8Weights, kStreamWidths };

constexpr int64_t kMaskBlock = 64;  // elements that a mask is drawn by

// One instruction set's entry points for one compute dtype; null where they are those of the set
// before it (kernel.cpp). `directions` structs (1 or 2) of the same shape. The workspace needs
// 64-byte alignment; its size is for exactly these arguments.
struct Kernel {
  int64_t (*forward_workspace)(const Forward* args, int directions, int threads);
  Waits (*forward)(const Forward* args, int directions, Crew crew, void* workspace);
  // A stack of layers of one direction at once, args from the first on: wavefront.h.
  bool (*wavefront_pays)(const Sequence& first, int layers, int threads);
  int64_t (*wavefront_workspace)(const Forward* args, int layers, int threads);
  Waits (*wavefront)(const Forward* args, int layers, Crew crew, void* workspace);
  int64_t (*backward_workspace)(const Backward* args, int directions, int threads);
  Waits (*backward)(const Backward* args, int directions, Crew crew, void* workspace);
  int64_t (*gradients_workspace)(const Gradients* args, int directions, int threads);
  Waits (*gradients)(const Gradients* args, int directions, Crew crew, void* workspace);
  StreamKernel stream[kStreamWidths];
  // Of a dropout mask, mask.h: `begin` is a multiple of kMaskBlock.
  void (*fill_mask)(void* mask, int64_t begin, int64_t count, double keep, uint64_t seed);
};

int isa_count();                  // sets built, slowest first
const char* isa_name(int index);  // "generic", "avx2", "avx512", "avx512_bf16", "amx"
bool isa_supported(int index);    // this processor and its system can run it
int isa_active();                 // the best supported, FUSED_LSTM_CPU's or the forced one
bool isa_force(int index);        // false if not supported; -1: back to the automatic choice

const Kernel& active_kernel(Dtype dtype);

}  // namespace fused_lstm::cpu
