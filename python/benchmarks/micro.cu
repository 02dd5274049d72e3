// What a step of a persistent kernel is made of, measured one by one on the GPU at hand, with the
// kernels' own loads, stores and products (csrc/cuda/device.cuh).
//
//   nvcc -std=c++17 -O3 -I../../csrc -gencode arch=compute_90a,code=sm_90a micro.cu -o micro
//
// Prints one JSON object a line as it goes: {"name", "value", "unit"} and facts beside it, or
// {"name", "error"}. Times are the median of kRuns launches over the steps in one launch, so a
// launch itself is not in them. Cluster barriers need sm_90; the rest runs from sm_80 on.

#include <algorithm>
#include <cstdio>
#include <cuda/atomic>
#include <string>
#include <vector>

#include "cuda/device.cuh"

using namespace fused_lstm::cuda;

namespace {

constexpr unsigned kPolls = 1u << 22;  // of half a microsecond each; then the launch is given up
constexpr int kThreads = 256, kSteps = 2000, kRuns = 5;
constexpr size_t kBytes = 4 << 20;

// ---- kernels -------------------------------------------------------------------------------

FUSED_LSTM_DEVICE void publish_words(Words* at, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(at), "r"(word)
               : "memory");
}

// The data is its own flag: every word of it holds the number of the step. Four words, because
// only each word for itself is certain to arrive whole.
FUSED_LSTM_DEVICE bool arrived(const Words& v, uint32_t step) {
  return v.word[0] == step && v.word[1] == step && v.word[2] == step && v.word[3] == step;
}

template <class Done>
FUSED_LSTM_DEVICE void wait(Done done) {
  for (unsigned poll = 0; !done(); ++poll) {
    if (poll == kPolls) give_up();
  }
}

// Each is called with what all blocks see, zeros at first, and a number of its own.

__global__ void empty(Words*, int) {}

// Block 0 and block `partner` answer each other, 256 bytes apart: two hops a step. With kFlag they
// release and acquire a word, as a flag beside data has to be; without it, data are polled.
template <bool kFlag>
__global__ void hop(Words* words, int partner) {
  const bool first = blockIdx.x == 0;
  if (threadIdx.x != 0 || !(first || int(blockIdx.x) == partner)) return;
  Words *mine = words + (first ? 0 : 16), *other = words + (first ? 16 : 0);
  using Flag = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;
  const auto send = [&](uint32_t step) {
    kFlag ? Flag(mine->word[0]).store(step, cuda::std::memory_order_release)
          : publish_words(mine, step);
  };
  const auto came = [&](uint32_t step) {
    return kFlag ? Flag(other->word[0]).load(cuda::std::memory_order_acquire) == step
                 : arrived(load_published_or_zero(true, other), step);
  };
  for (uint32_t step = 1; step <= kSteps; ++step) {
    if (first) send(step);
    wait([&] { return came(step); });
    if (!first) send(step);
  }
}

// One exchange of the hidden state: every block publishes its chunks of 16 bytes and gathers
// everyone's into shared memory, kChunks a thread, polling the data. Two buffers in turn: a block
// can overwrite step t only after it has step t + 1 of everyone, who then all had step t. Without
// kWait nothing is published, and what is there is taken.
template <int kChunks, bool kWait>
__global__ void all_gather(Words* buffers, int) {
  auto* gathered = reinterpret_cast<Words*>(shared_memory());
  const int total = kChunks * kThreads, own = total / gridDim.x;
  for (uint32_t step = 1; step <= kSteps; ++step) {
    Words* buffer = buffers + (step & 1) * total;
    if (kWait && int(threadIdx.x) < own) {
      publish_words(buffer + blockIdx.x * own + threadIdx.x, step);
    }
    Words chunk[kChunks] = {};
    wait([&] {
      bool all = true;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        load_published(!arrived(chunk[i], step), buffer + threadIdx.x + i * kThreads, chunk[i]);
      }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) all = all && arrived(chunk[i], step);
      return all || !kWait;
    });
#pragma unroll
    for (int i = 0; i < kChunks; ++i) gathered[threadIdx.x + i * kThreads] = chunk[i];
    block_barrier();
  }
}

// Release and acquire cost a fence of the whole GPU; relaxed is the barrier alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int kSize, bool kRelaxed>
__global__ void cluster_barrier(Words*, int) {}
#else
template <int kSize, bool kRelaxed>
__global__ void __cluster_dims__(kSize, 1, 1) cluster_barrier(Words*, int) {
  for (int step = 0; step < kSteps; ++step) {
    if (kRelaxed) {
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    } else {
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
  }
}
#endif

// kThreads / 32 warps a block, four independent accumulators each: what one SM can multiply.
__global__ void products(Words* words, int steps) {
  float d[4][4] = {};
  // Small numbers of both signs that differ by lane: zeros would run cooler.
  Words a;
  for (uint32_t i = 0; i < 4; ++i) a.word[i] = 0x2c003c00u ^ threadIdx.x * 0x00110013u ^ i << 15;
  const uint32_t b = 0x3400ac00u ^ threadIdx.x * 0x00090007u;
  block_barrier();
  const long long start = clock64();
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (auto& sums : d) mma_f16(sums, a, b, b ^ 1u << 31);
  }
  block_barrier();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *reinterpret_cast<long long*>(words) = clock64() - start;
  }
  float sum = 0;
  for (auto& sums : d) sum += sums[0] + sums[1] + sums[2] + sums[3];
  if (sum == 1.2345f) words->word[0] = 0;  // never: keeps the products
}

// ---- host side -----------------------------------------------------------------------------

using Kernel = void (*)(Words*, int);
int sms, alone;  // multiprocessors; bytes of shared memory that keep a block alone on one
Words* words;    // kBytes, cleared before each launch
cudaEvent_t start, stop;

bool failed(const std::string& name, cudaError_t status) {
  if (status == cudaSuccess) return false;
  std::printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", name.c_str(), cudaGetErrorString(status));
  return true;
}

void report(const std::string& name, double value, const char* unit) {
  std::printf("{\"name\": \"%s\", \"value\": %.5g, \"unit\": \"%s\"}\n", name.c_str(), value, unit);
}

// The blocks of a cooperative launch are on the GPU at once, or it fails: nobody waits for a block
// that can't start.
cudaError_t launch(Kernel kernel, int blocks, int shared, bool cooperative, int number) {
  void* arguments[] = {&words, &number};
  const auto* code = reinterpret_cast<const void*>(kernel);
  return cooperative
             ? cudaLaunchCooperativeKernel(code, blocks, kThreads, arguments, shared, nullptr)
             : cudaLaunchKernel(code, blocks, kThreads, arguments, shared, nullptr);
}

// Reports and returns microseconds of a step, of which a launch has so many: the median of kRuns
// after one that warms up. Negative, and an error line, where it fails.
double measure(const std::string& name, Kernel kernel, int blocks, bool cooperative = true,
               int number = 0, int steps = kSteps, int launches = 1) {
  const int shared = launches > 1 ? 0 : alone;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  std::vector<float> times;
  for (int run = 0; run <= kRuns; ++run) {
    float ms = 0;
    if (failed(name, cudaMemset(words, 0, kBytes)) || failed(name, cudaEventRecord(start)))
      return -1;
    for (int i = 0; i < launches; ++i) {
      if (failed(name, launch(kernel, blocks, shared, cooperative, number))) return -1;
    }
    if (failed(name, cudaEventRecord(stop)) || failed(name, cudaEventSynchronize(stop)) ||
        failed(name, cudaEventElapsedTime(&ms, start, stop))) {
      return -1;
    }
    if (run) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  const double us = times[kRuns / 2] * 1e3 / steps / launches;
  report(name, us, "us");
  return us;
}

// On three quarters of the multiprocessors: a second wave would double the time.
template <int kSize>
void measure_clusters() {
  const std::string name = "cluster barrier of " + std::to_string(kSize);
  const int blocks = sms * 3 / 4 / kSize * kSize;
  measure(name, cluster_barrier<kSize, false>, blocks, false);
  measure(name + ", relaxed", cluster_barrier<kSize, true>, blocks, false);
}

void measure_products(const std::string& name) {
  const int steps = 20000;
  const double us = measure(name, products, sms, true, steps, steps);
  long long cycles = 0;
  if (us < 0 || failed(name, cudaMemcpy(&cycles, words, sizeof cycles, cudaMemcpyDefault))) return;
  const double a_step = 4.0 * kThreads / 32;  // on a multiprocessor
  report(name + ", a cycle and multiprocessor", a_step * steps / double(cycles), "mma");
  report(name + ", on all", a_step * sms * 4096 / us * 1e-6, "TFLOP/s");
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // each line as it comes: a hang shows where
  cudaDeviceProp properties;
  if (failed("device", cudaGetDeviceProperties(&properties, 0)) ||
      failed("device", cudaMalloc(&words, kBytes)) || failed("device", cudaEventCreate(&start)) ||
      failed("device", cudaEventCreate(&stop))) {
    return 1;
  }
  sms = properties.multiProcessorCount;
  alone = int(properties.sharedMemPerBlockOptin) * 3 / 4;

  for (int partner : {1, sms / 4, sms / 2, sms - 1}) {  // near and far
    const std::string to = " hop to block " + std::to_string(partner);
    measure("flag" + to, hop<true>, sms, true, partner, 2 * kSteps);
    measure("data" + to, hop<false>, sms, true, partner, 2 * kSteps);
  }
  measure("all-gather S=48 x 256 B = 12 KB", all_gather<3, true>, 48);
  measure("all-gather S=48 x 1024 B = 48 KB", all_gather<12, true>, 48);
  measure("L2 round of 12 KB and a block barrier", all_gather<3, false>, sms);
  measure("L2 round of 48 KB and a block barrier", all_gather<12, false>, sms);
  measure_products("mma.sync m16n8k16 fp16");
  if (properties.major >= 9) {
    measure_clusters<2>();
    measure_clusters<4>();
    measure_clusters<8>();
  }
  measure("launch, one after another", empty, 1, false, 0, 1, 2000);
  measure("cooperative launch, one after another", empty, sms, true, 0, 1, 2000);
  return 0;
}
