// A stream, a device and a launch, as the host file and the kernels' own host code name them: no
// CUDA header is needed to include this.
#pragma once

#include <cstddef>
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

struct Grid {
  int blocks, threads, shared_bytes;
  bool together;  // all blocks must run at once: a cooperative launch, refused where they can't
};

// Of the current device; null on success, else what went wrong.
const char* properties(Device& device);

// Enqueues kernel(*params) on the stream; null on success, else what went wrong.
const char* launch_function(const void* kernel, const Grid& grid, Stream stream,
                            const void* params);

// How many blocks of this shape one multiprocessor of the current device holds; 0 if it can't run
// the kernel.
int resident_blocks_of(const void* kernel, const Grid& grid);

// Sets `bytes` bytes to `value`.
const char* fill(void* at, int value, size_t bytes, Stream stream);

}  // namespace fused_lstm::cuda
