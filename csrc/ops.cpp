// Defines the operators. A backend registers its kernels for its dispatch key (cpu/host.cpp,
// cuda/host.cpp; triton.cpp has a library of its own), Python the rest (fused_lstm/ops.py: fakes,
// autograd, FLOP formulas) but for autograd of eager calls (autograd.cpp).
#include <torch/library.h>

#include "schemas.h"

TORCH_LIBRARY(fused_lstm, m) {
  for (const std::string& schema : fused_lstm::schemas()) m.def(schema.c_str());
  m.def(fused_lstm::kStackSchema.c_str());
}
