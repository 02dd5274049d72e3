// The one place where kernels are launched, and what else the host code asks of CUDA.
#pragma once

#include "device.cuh"
#include "launch.h"

#ifndef FUSED_LSTM_EMULATION  // emulation.h has all of these too

namespace fused_lstm::cuda {

struct Grid {
  int blocks, threads, shared_bytes;
  bool together;  // all blocks must run at once: a cooperative launch, refused where they can't
};

// Null on success. An error told here is not left for whoever asks CUDA next.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Enqueues kernel(params) on the stream; null on success, else what went wrong.
template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, Stream stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr int kWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kWithoutAsking) {
    if (const cudaError_t error = cudaFuncSetAttribute(
            function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes))
      return error_text(error);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const dim3 blocks(grid.blocks), threads(grid.threads);
  const auto queue = static_cast<cudaStream_t>(stream);
  return error_text(grid.together ? cudaLaunchCooperativeKernel(function, blocks, threads,
                                                                arguments, grid.shared_bytes, queue)
                                  : cudaLaunchKernel(function, blocks, threads, arguments,
                                                     grid.shared_bytes, queue));
}

// How many blocks of this shape one multiprocessor holds.
template <class Params>
int resident_blocks(void (*kernel)(Params), const Grid& grid) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int count = 0;
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           grid.shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, grid.threads,
                                                    grid.shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// Sets `bytes` bytes to `value`.
inline const char* fill(void* at, int value, size_t bytes, Stream stream) {
  return error_text(cudaMemsetAsync(at, value, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fused_lstm::cuda
#endif
