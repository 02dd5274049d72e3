#include "launch.cuh"

#ifndef FUSED_LSTM_EMULATION  // which makes up a device

namespace fused_lstm::cuda {

const char* properties(Device& device) {
  int ordinal;
  if (const cudaError_t error = cudaGetDevice(&ordinal)) return error_text(error);
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    return cudaDeviceGetAttribute(&value, which, ordinal);
  };
  int cooperative = 0;
  // Attributes are kept by the runtime: asking for them again costs well below a microsecond.
  const cudaError_t errors[] = {
      attribute(device.multiprocessors, cudaDevAttrMultiProcessorCount),
      attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(device.major, cudaDevAttrComputeCapabilityMajor),
      attribute(device.minor, cudaDevAttrComputeCapabilityMinor),
      attribute(cooperative, cudaDevAttrCooperativeLaunch),
  };
  device.cooperative = cooperative != 0;
  for (const cudaError_t error : errors)
    if (error != cudaSuccess) return error_text(error);
  return nullptr;
}

}  // namespace fused_lstm::cuda
#endif
