// Runs the bfloat16 kernels of the emulated AMX set beside the generic set on the same random
// layers, forward, backward and gradients, and fails where they differ by more than bfloat16's
// rounding can.
#include "../kernel_layers/layer.h"

using namespace fused_lstm;
using kernel_layers::Case, kernel_layers::Outcome, kernel_layers::run;

namespace fused_lstm::cpu::generic {
extern const Kernel kernels[kDtypes];
}
namespace fused_lstm::cpu::amx {
extern const Kernel kernels[kDtypes];
}

int main() {
  const Case cases[] = {
      {5, 3, 7, 17, 17, false, false, 1, 1},   {4, 33, 33, 33, 33, false, false, 2, 2},
      {9, 17, 3, 129, 129, true, false, 1, 2}, {3, 40, 64, 96, 96, false, false, 1, 2},
      {7, 19, 5, 33, 17, true, true, 2, 2},    {6, 65, 31, 160, 160, false, false, 1, 2},
  };
  int failures = 0;
  for (const Case& c : cases) {
    const unsigned seed = 20261121;
    const Outcome truth = run(cpu::generic::kernels[kBFloat16], kBFloat16, c, seed),
                  amx = run(cpu::amx::kernels[kBFloat16], kBFloat16, c, seed);
    double worst = 0;
    for (size_t b = 0; b < truth.buffers.size(); ++b) {
      double largest = 0, apart = 0;
      for (int64_t i = 0; i < truth.buffers[b].count; ++i) {
        const double t = truth.buffers[b].get(i), a = amx.buffers[b].get(i);
        if (!(std::fabs(a) < 1e30)) apart = INFINITY;
        largest = std::fmax(largest, std::fabs(t));
        apart = std::fmax(apart, std::fabs(t - a));
      }
      if (largest > 0) worst = std::fmax(worst, apart / largest);
    }
    // bfloat16 has 8 bits: results a few roundings apart differ by some 2^-8 of the largest
    const bool good = worst < 0.03;
    failures += !good;
    std::printf(
        "T %lld B %lld I %lld H %lld P %lld packed %d directions %d: differ by %.4f of the largest "
        "%s\n",
        (long long)c.T, (long long)c.B, (long long)c.I, (long long)c.H, (long long)c.P, c.packed,
        c.directions, worst, good ? "" : "TOO MUCH");
  }
  return failures;
}
