// Defines the operators. A backend registers its kernels for its dispatch key (cpu/host.cpp,
// cuda/host.cpp), Python the rest (fused_lstm/ops.py: fakes, autograd, FLOP formulas) but for
// autograd of eager calls (autograd.cpp).
#include <torch/library.h>

#include "schemas.h"

TORCH_LIBRARY(fused_lstm, m) {
  for (const char* schema : fused_lstm::kSchemas) m.def(schema);
}
