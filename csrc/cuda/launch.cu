// What is asked of the CUDA runtime. Answers that never change are asked for once, for a call takes
// from one to some microseconds, and a small layer not many more.
#include "launch.h"

#ifndef FUSED_LSTM_EMULATION  // which makes up a device

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <tuple>

namespace fused_lstm::cuda {
namespace {

// Of one device. Errors are not kept: the next call asks again.
struct Answers {
  Device device{};
  bool known = false;
  std::set<const void*> prepared;  // kernels that may have all the shared memory there is
  std::map<std::tuple<const void*, int, int>, int> resident;  // by kernel, threads, shared_bytes
};

std::mutex mutex;
std::map<int, Answers> answers;  // by ordinal; under the mutex

// Null on success. An error told here is not left for whoever asks CUDA next.
const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

cudaError_t ask(int ordinal, Device& device) {
  int cooperative = 0;
  const std::pair<int*, cudaDeviceAttr> questions[] = {
      {&device.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device.major, cudaDevAttrComputeCapabilityMajor},
      {&device.minor, cudaDevAttrComputeCapabilityMinor},
      {&cooperative, cudaDevAttrCooperativeLaunch},
  };
  for (const auto& [value, which] : questions)
    if (const cudaError_t error = cudaDeviceGetAttribute(value, which, ordinal)) return error;
  device.cooperative = cooperative != 0;
  return cudaSuccess;
}

// Calls run(answers) with those of the current device.
template <class Run>
cudaError_t with_answers(Run run) {
  int ordinal;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  Answers& known = answers[ordinal];
  if (!known.known)
    if (const cudaError_t error = ask(ordinal, known.device)) return error;
  known.known = true;
  return run(known);
}

// The kernel may have all of a multiprocessor's shared memory from here on. The attribute is never
// set to anything else: two threads that launch a kernel with different sizes would set it back
// between each other's setting and launch.
cudaError_t prepare(Answers& known, const void* kernel) {
  if (known.prepared.count(kernel)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, known.device.shared_bytes);
  if (error == cudaSuccess) known.prepared.insert(kernel);
  return error;
}

constexpr int kWithoutAsking = 48 << 10;  // bytes of shared memory that any kernel may have

}  // namespace

const char* properties(Device& device) {
  return error_text(with_answers([&](const Answers& known) {
    device = known.device;
    return cudaSuccess;
  }));
}

const char* launch_function(const void* kernel, const Grid& grid, Stream stream,
                            const void* params) {
  if (grid.shared_bytes > kWithoutAsking)
    if (const cudaError_t error =
            with_answers([&](Answers& known) { return prepare(known, kernel); }))
      return error_text(error);
  void* arguments[] = {const_cast<void*>(params)};
  const dim3 blocks(grid.blocks), threads(grid.threads);
  const auto queue = static_cast<cudaStream_t>(stream);
  return error_text(grid.together ? cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments,
                                                                grid.shared_bytes, queue)
                                  : cudaLaunchKernel(kernel, blocks, threads, arguments,
                                                     grid.shared_bytes, queue));
}

int resident_blocks_of(const void* kernel, const Grid& grid) {
  int count = 0;
  const cudaError_t error = with_answers([&](Answers& known) {
    const auto key = std::make_tuple(kernel, grid.threads, grid.shared_bytes);
    const auto found = known.resident.find(key);
    if (found != known.resident.end()) {
      count = found->second;
      return cudaSuccess;
    }
    cudaError_t failed = prepare(known, kernel);
    if (failed == cudaSuccess)
      failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads,
                                                             grid.shared_bytes);
    if (failed == cudaSuccess) known.resident[key] = count;
    return failed;
  });
  return error_text(error) ? 0 : count;
}

const char* fill(void* at, int value, size_t bytes, Stream stream) {
  return error_text(cudaMemsetAsync(at, value, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fused_lstm::cuda
#endif
