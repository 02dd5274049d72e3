// A stream and a device, as the host file and the kernels' own host code name them: no CUDA header
// is needed to include this.
#pragma once

#include <cstdint>

namespace fused_lstm::cuda {

using Stream = void*;  // a cudaStream_t

// What decides which kernels a device can run, and how many blocks at a time.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may ask for
  int major, minor;  // compute capability
  bool cooperative;
};

// Of the current device; null on success, else what went wrong.
const char* properties(Device& device);

}  // namespace fused_lstm::cuda
