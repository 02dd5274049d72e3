// A CUDA runtime that counts what it is asked, for csrc/cuda/launch.cu (test_cuda_launch.py). Each
// device lets a block have 227 KB of shared memory, and a kernel what it was last allowed.
#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "cuda/launch.h"

namespace {

thread_local int device = 0;
std::atomic<int> attributes, settings, occupancies, launches, failing;
std::mutex mutex;
std::map<std::pair<int, const void*>, int> allowed;

cudaError_t launched(const void* kernel, size_t shared_bytes) {
  ++launches;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find({device, kernel});
  const int most = found == allowed.end() ? 48 << 10 : found->second;
  return shared_bytes <= size_t(most) ? cudaSuccess : cudaErrorInvalidValue;
}

const void* kernel_of(int number) { return reinterpret_cast<const void*>(uintptr_t(number)); }

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* which) {
  *which = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  ++attributes;
  *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10 : 1;
  return failing ? cudaErrorInitializationError : cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  ++settings;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    allowed[{device, kernel}] = value;
  }
  std::this_thread::yield();  // to whoever would set it back
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  ++occupancies;
  *count = 1;
  return failing ? cudaErrorInvalidDeviceFunction : cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t shared_bytes,
                             cudaStream_t) {
  return launched(kernel, shared_bytes);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t shared_bytes,
                                        cudaStream_t) {
  return launched(kernel, shared_bytes);
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "made up"; }

// What tests call.
void runtime_device(int which) { device = which; }
void runtime_fail(int on) { failing = on; }
void runtime_counts(int (&values)[4]) {
  values[0] = attributes, values[1] = settings, values[2] = occupancies, values[3] = launches;
}
const char* runtime_launch(int kernel, int shared_bytes) {
  const fused_lstm::cuda::Grid grid{1, 32, shared_bytes, false};
  return fused_lstm::cuda::launch_function(kernel_of(kernel), grid, nullptr, nullptr);
}
int runtime_resident(int kernel, int shared_bytes) {
  const fused_lstm::cuda::Grid grid{1, 32, shared_bytes, true};
  return fused_lstm::cuda::resident_blocks_of(kernel_of(kernel), grid);
}
const char* runtime_properties() {
  fused_lstm::cuda::Device found;
  return fused_lstm::cuda::properties(found);
}

}  // extern "C"
