// What a step of a persistent kernel is made of, measured one by one on the GPU at hand.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a micro.cu -o micro && ./micro
//
// Prints one JSON object a line as it goes: {"name", "value", "unit"} and facts beside it, or
// {"name", "error"}. Times are the median of `kRuns` launches over the steps in one launch, so a
// launch itself is not in them. Every spin loop gives up after `kPolls` polls; that is an error.
//
// Cluster barriers need sm_90; the rest runs from sm_80 on. Uses no torch, only the CUDA runtime.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "micro.cuh"

namespace {

constexpr int kRuns = 5;

struct Device {
  int sms = 0;
  int capability = 0;          // 90
  int shared_bytes = 0;        // that a block may ask for
  unsigned* words = nullptr;   // 4 MiB, cleared before each launch
  unsigned* broken = nullptr;  // set by a wait that was given up
  long long* cycles = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;
};
constexpr size_t kBytes = 4 << 20;
Device device;

bool failed(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return false;
  std::printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", name, cudaGetErrorString(status));
  std::fflush(stdout);
  return true;
}

void report(const char* name, double value, const char* unit) {
  std::printf("{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"%s\"}\n", name, value, unit);
  std::fflush(stdout);
}

// Milliseconds of `launch`, the median of kRuns after one that warms up; negative (and an error
// line) where it fails.
template <typename Launch>
double time_ms(const char* name, Launch launch) {
  std::vector<float> times;
  for (int run = 0; run <= kRuns; ++run) {
    if (failed(name, cudaMemset(device.words, 0, kBytes))) return -1;
    if (failed(name, cudaMemset(device.broken, 0, sizeof(unsigned)))) return -1;
    if (failed(name, cudaDeviceSynchronize())) return -1;
    cudaEventRecord(device.start);
    if (failed(name, launch())) return -1;
    cudaEventRecord(device.stop);
    if (failed(name, cudaEventSynchronize(device.stop))) return -1;
    if (failed(name, cudaGetLastError())) return -1;
    unsigned broken = 0;
    cudaMemcpy(&broken, device.broken, sizeof broken, cudaMemcpyDeviceToHost);
    if (broken) {
      std::printf("{\"name\": \"%s\", \"error\": \"a wait was given up\"}\n", name);
      std::fflush(stdout);
      return -1;
    }
    float ms = 0;
    cudaEventElapsedTime(&ms, device.start, device.stop);
    if (run) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// All blocks of a cooperative launch are on the GPU at once, or it fails: nobody waits for a block
// that can't start. `shared` is also how one block is kept from sharing its SM.
template <typename... Parameters, typename... Arguments>
cudaError_t cooperative(void (*kernel)(Parameters...), int blocks, int shared, Arguments... given) {
  if (shared) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
  auto launch = [&](Parameters... arguments) {
    void* pointers[] = {&arguments..., nullptr};
    return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                       dim3(kThreads), pointers, size_t(shared), cudaStream_t());
  };
  return launch(Parameters(given)...);
}

void barriers() {
  const int steps = 2000;
  double ms = time_ms("grid.sync", [&] { return cooperative(grid_sync, device.sms, 0, steps); });
  if (ms > 0) report("grid.sync", ms * 1e3 / steps, "us");
  ms = time_ms("counter barrier", [&] {
    return cooperative(counter_barrier, device.sms, 0, device.words, steps, device.broken);
  });
  if (ms > 0) report("counter barrier", ms * 1e3 / steps, "us");
}

void hops() {
  const int steps = 2000;
  const int alone = device.shared_bytes * 3 / 4;  // one block an SM
  std::vector<int> partners = {1, 2, 3, 5, 8, 13};
  for (int part = 1; part < 8; ++part) partners.push_back(device.sms * part / 8);
  partners.push_back(device.sms - 1);
  const auto line = [](const char* name, std::vector<double>& us) {
    if (us.empty()) return;
    std::sort(us.begin(), us.end());
    std::printf(
        "{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"us\", \"least\": %.5g, "
        "\"most\": %.5g, \"pairs\": %zu}\n",
        name, us[us.size() / 2], us.front(), us.back(), us.size());
    std::fflush(stdout);
  };
  std::vector<double> flags, data;
  for (int partner : partners) {
    if (partner <= 0 || partner >= device.sms) continue;
    const double ms = time_ms("flag hop", [&] {
      return cooperative(flag_hop, device.sms, alone, device.words, partner, steps, device.broken);
    });
    if (ms < 0) break;
    flags.push_back(ms * 1e3 / (2 * steps));
  }
  line("flag hop", flags);
  for (int partner : partners) {
    if (partner <= 0 || partner >= device.sms) continue;
    const double ms = time_ms("data hop", [&] {
      return cooperative(data_hop, device.sms, alone, reinterpret_cast<uint4*>(device.words),
                         partner, steps, device.broken);
    });
    if (ms < 0) break;
    data.push_back(ms * 1e3 / (2 * steps));
  }
  line("data hop", data);
}

template <int kChunks>
void gather_step(int blocks, int bytes_each) {
  const int own = bytes_each / 16, total = own * blocks, steps = 2000;
  const int shared = std::max(total * 16, device.shared_bytes * 3 / 4);  // one block an SM
  char name[80];
  std::snprintf(name, sizeof name, "all-gather S=%d x %d B = %d KB", blocks, bytes_each,
                total / 64);
  const double ms = time_ms(name, [&] {
    return cooperative(all_gather<kChunks>, blocks, shared, reinterpret_cast<uint4*>(device.words),
                       own, total, steps, device.broken);
  });
  if (ms > 0) report(name, ms * 1e3 / steps, "us");
}

void gathers() {
  for (int blocks : {48, 64, 128}) {
    if (blocks > device.sms) continue;  // a smaller GPU
    gather_step<3>(blocks, 12 * 1024 / blocks);
    if (blocks == 64) gather_step<4>(blocks, 256);
    if (blocks == 128) gather_step<8>(blocks, 256);
    gather_step<12>(blocks, 48 * 1024 / blocks);
  }
}

template <bool kRelaxed>
void clusters() {
  const auto kernel = cluster_barrier<kRelaxed>;
  if (device.capability < 90) {
    std::puts("{\"name\": \"cluster barrier\", \"error\": \"needs compute capability 9.0\"}");
    return;
  }
  const int steps = 2000;
  for (int size : {2, 4, 8}) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(device.sms / size * size));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(device.shared_bytes * 3 / 4);  // one block an SM
    config.attrs = &attribute;
    config.numAttrs = 1;
    char name[48];
    std::snprintf(name, sizeof name, "cluster barrier of %d%s", size, kRelaxed ? ", relaxed" : "");
    if (failed(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(config.dynamicSmemBytes)))) {
      continue;
    }
    int fit = 0;
    if (failed(name, cudaOccupancyMaxActiveClusters(&fit, kernel, &config))) continue;
    // As many as run at once: a second wave would double the time.
    config.gridDim.x = unsigned(std::max(fit, 1) * size);
    const double ms = time_ms(name, [&] { return cudaLaunchKernelEx(&config, kernel, steps); });
    if (ms < 0) continue;
    std::printf("{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"us\", \"clusters_at_once\": %d}\n",
                name, ms * 1e3 / steps, fit);
    std::fflush(stdout);
  }
}

template <int kChunks, bool kSync>
void l2_read(const char* name, int threads) {
  const int rounds = 2000;
  const auto* data = reinterpret_cast<const uint4*>(device.words);
  const double ms = time_ms(name, [&] {
    read_l2<kChunks, kSync><<<device.sms, threads>>>(data, rounds, device.words + kBytes / 4 - 1);
    return cudaGetLastError();
  });
  if (ms < 0) return;
  const double bytes = 16.0 * kChunks * threads * rounds * device.sms;
  std::printf(
      "{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"%s\", \"gb_per_s\": %.5g, "
      "\"bytes_per_round\": %d}\n",
      name, kSync ? ms * 1e3 / rounds : bytes / ms * 1e-6, kSync ? "us" : "GB/s", bytes / ms * 1e-6,
      16 * kChunks * threads);
  std::fflush(stdout);
}

template <bool kBf16>
void mma(const char* name) {
  const int iterations = 20000, warps = kThreads / 32;
  auto* sink = reinterpret_cast<float*>(device.words);
  const double ms = time_ms(name, [&] {
    mma_rate<kBf16><<<device.sms, kThreads>>>(iterations, sink, device.cycles);
    return cudaGetLastError();
  });
  if (ms < 0) return;
  long long cycles = 0;
  cudaMemcpy(&cycles, device.cycles, sizeof cycles, cudaMemcpyDeviceToHost);
  const double products = 4.0 * iterations * warps;  // an SM
  std::printf(
      "{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"mma a cycle per SM\", "
      "\"tflops\": %.5g, \"mhz\": %.5g}\n",
      name, products / double(cycles), products * device.sms * 4096 / ms * 1e-9,
      double(cycles) / ms * 1e-3);
  std::fflush(stdout);
}

void copy() {
  const char* name = "device copy, read + write";
  const size_t bytes = size_t(1) << 30;
  void *from = nullptr, *to = nullptr;
  if (!failed(name, cudaMalloc(&from, bytes)) && !failed(name, cudaMalloc(&to, bytes))) {
    cudaMemset(from, 0x5a, bytes);
    const double ms =
        time_ms(name, [&] { return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice); });
    if (ms > 0) report(name, 2.0 * double(bytes) / ms * 1e-6, "GB/s");
  }
  cudaFree(from);
  cudaFree(to);
}

void launches() {
  const int count = 2000;
  double ms = time_ms("launch", [&] {
    for (int i = 0; i < count; ++i) empty<<<1, 32>>>();
    return cudaGetLastError();
  });
  if (ms > 0) report("launch, one after another", ms * 1e3 / count, "us");
  ms = time_ms("cooperative launch", [&] {
    cudaError_t status = cudaSuccess;
    for (int i = 0; i < count && status == cudaSuccess; ++i) {
      status = cooperative(grid_sync, device.sms, 0, 0);
    }
    return status;
  });
  if (ms > 0) report("cooperative launch, one after another", ms * 1e3 / count, "us");
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  if (failed("device", cudaGetDeviceProperties(&properties, 0))) return 1;
  device.sms = properties.multiProcessorCount;
  device.capability = properties.major * 10 + properties.minor;
  device.shared_bytes = int(properties.sharedMemPerBlockOptin);
  if (failed("device", cudaMalloc(&device.words, kBytes))) return 1;
  if (failed("device", cudaMalloc(&device.broken, sizeof(unsigned)))) return 1;
  if (failed("device", cudaMalloc(&device.cycles, sizeof(long long)))) return 1;
  if (failed("device", cudaEventCreate(&device.start))) return 1;
  if (failed("device", cudaEventCreate(&device.stop))) return 1;

  barriers();
  hops();
  gathers();
  clusters<false>();
  clusters<true>();
  l2_read<1, false>("L2 read, all SMs the same 16 KB", 1024);
  l2_read<4, false>("L2 read, all SMs the same 64 KB", 1024);
  l2_read<3, true>("L2 round of 12 KB and a block barrier", kThreads);
  l2_read<12, true>("L2 round of 48 KB and a block barrier", kThreads);
  mma<false>("mma.sync m16n8k16 fp16");
  mma<true>("mma.sync m16n8k16 bf16");
  launches();
  copy();
  return 0;
}
