// The one place where kernels are launched, by their own type.
#pragma once

#include "device.cuh"
#include "launch.h"

#ifndef FUSED_LSTM_EMULATION  // emulation.h has all of these too

namespace fused_lstm::cuda {

template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  return launch_function(reinterpret_cast<const void*>(kernel), grid, stream, &params);
}

template <class Params>
int resident_blocks(void (*kernel)(Params), const Grid& grid) {
  return resident_blocks_of(reinterpret_cast<const void*>(kernel), grid);
}

}  // namespace fused_lstm::cuda
#endif
