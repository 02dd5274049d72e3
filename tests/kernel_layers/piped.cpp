// One call of the kernels of one instruction set (FUSED_LSTM_ISA), operands on the standard input,
// results on the standard output, raw and in layer.h's order: for a machine, emulated or not, that
// has no torch. First come the dtype and ten numbers in Case's order, int64 all, then batch_sizes
// where packed.
#include "layer.h"

using namespace fused_lstm;
using kernel_layers::Buffer, kernel_layers::Case, kernel_layers::Outcome;

namespace fused_lstm::cpu::FUSED_LSTM_ISA {
extern const Kernel kernels[kDtypes];
}

bool take(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

int main() {
  int64_t n[11];
  bool complete = take(n, sizeof n);
  if (!complete) return 1;
  const Dtype dtype = Dtype(n[0]);
  Case c = {n[1], n[2], n[3], n[4], n[5], n[6] != 0, n[7] != 0, int(n[8]), int(n[9]), n[10] != 0};
  if (c.packed) {
    c.sizes.resize(size_t(c.T));
    complete = take(c.sizes.data(), c.sizes.size() * sizeof(int64_t));
  }
  const Outcome outcome = kernel_layers::run_with(
      cpu::FUSED_LSTM_ISA::kernels[dtype], dtype, c, [&](Buffer& operand, float) {
        complete &=
            take(operand.at(0), size_t(operand.count) * kernel_layers::element_bytes(dtype));
      });
  for (const Buffer& result : outcome.buffers)
    std::fwrite(result.at(0), kernel_layers::element_bytes(dtype), size_t(result.count), stdout);
  return !complete || std::fgetc(stdin) != EOF || std::fflush(stdout) != 0;
}
