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

// One instruction set's entry points for one compute dtype. `directions` structs (1 or 2) of the
// same shape. The workspace needs 64-byte alignment; its size is for exactly these arguments.
struct Kernel {
  int64_t (*forward_workspace)(const Forward* args, int directions, int threads);
  Waits (*forward)(const Forward* args, int directions, Crew crew, void* workspace);
  int64_t (*backward_workspace)(const Backward* args, int directions, int threads);
  Waits (*backward)(const Backward* args, int directions, Crew crew, void* workspace);
  int64_t (*gradients_workspace)(const Gradients* args, int directions, int threads);
  Waits (*gradients)(const Gradients* args, int directions, Crew crew, void* workspace);
};

int isa_count();                  // sets built, slowest first
const char* isa_name(int index);  // "generic", "avx2", "avx512", "avx512_bf16", "amx"
bool isa_supported(int index);    // this processor and its system can run it
int isa_active();                 // the best supported, FUSED_LSTM_CPU's or the forced one
bool isa_force(int index);        // false if not supported; -1: back to the automatic choice

const Kernel& active_kernel(Dtype dtype);

}  // namespace fused_lstm::cpu
