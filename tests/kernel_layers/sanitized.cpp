// Runs the kernels of one instruction set (FUSED_LSTM_ISA) in every dtype, by one to three threads
// and by two that end as one, for a sanitizer to watch; fails where a result isn't finite, or isn't
// what one thread gives.
#include "layer.h"

using namespace fused_lstm;
using kernel_layers::Case, kernel_layers::Outcome, kernel_layers::run;

namespace fused_lstm::cpu::FUSED_LSTM_ISA {
extern const Kernel kernels[kDtypes];
}

static Case of_ids(Case c) {
  c.ids = true;
  return c;
}

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, false, false, 1, 0},
      {1, 1, 5, 33, 33, false, false, 1, 0},
      {5, 3, 7, 17, 17, false, false, 1, 0},
      {4, 33, 33, 33, 33, false, false, 2, 0},
      {9, 17, 3, 129, 129, true, false, 1, 0},
      {7, 19, 5, 33, 17, true, true, 2, 0},
      {6, 12, 31, 320, 320, false, false, 1, 0},
      {6, 1, 31, 320, 65, false, true, 1, 0},
      {13, 33, 5, 33, 33, false, false, 2, 0},
      {17, 31, 7, 65, 33, true, true, 1, 0},
      of_ids({1, 3, 5, 33, 33, false, false, 1, 0}),
      of_ids({2, 4, 5, 33, 17, false, true, 2, 0}),
      of_ids({9, 17, 3, 129, 129, true, false, 1, 0}),
      of_ids({13, 33, 65, 33, 33, false, false, 2, 0}),
      of_ids({3, 5, 7, 131, 131, false, false, 1, 0}),
  };
  int failures = 0, runs = 0;
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    for (Case c : cases) {
      const cpu::Kernel& kernel = cpu::FUSED_LSTM_ISA::kernels[dtype];
      c.threads = 1;
      const Outcome alone = run(kernel, Dtype(dtype), c, 20261121);
      for (int crew = 0; crew < 3; ++crew) {
        c.threads = crew == 1 ? 3 : 2;
        c.patient = crew != 2;
        const Outcome shared = run(kernel, Dtype(dtype), c, 20261121);
        ++runs;
        double worst = 0;
        for (size_t b = 0; b < alone.buffers.size(); ++b) {
          double largest = 1e-30, apart = 0;
          for (int64_t i = 0; i < alone.buffers[b].count; ++i) {
            const double one = alone.buffers[b].get(i), many = shared.buffers[b].get(i);
            if (!std::isfinite(one) || !std::isfinite(many)) apart = INFINITY;
            largest = std::fmax(largest, std::fabs(one));
            apart = std::fmax(apart, std::fabs(one - many));
          }
          worst = std::fmax(worst, apart / largest);
        }
        const double allowed = dtype == kFloat64 ? 1e-12 : dtype == kFloat32 ? 1e-4 : 0.03;
        if (worst <= allowed) continue;
        ++failures;
        std::printf("dtype %d T %lld B %lld H %lld crew %d: differ by %.3g of the largest\n", dtype,
                    (long long)c.T, (long long)c.B, (long long)c.H, crew, worst);
      }
    }
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}
