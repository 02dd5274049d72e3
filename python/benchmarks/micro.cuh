// The kernels of micro.cu: each repeats one thing that a step of a persistent kernel does.
#pragma once

#include <cooperative_groups.h>

namespace {

constexpr unsigned kPolls = 1u << 19;  // of about half a microsecond each
constexpr int kThreads = 256;

// ---- device side: memory operations that go to L2 ------------------------------------------

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(unsigned* p, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned add_release(unsigned* p) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// The data is its own flag: every word of it holds the number of the step. Four words, because
// only each word for itself is certain to arrive whole.
__device__ __forceinline__ bool arrived(uint4 v, unsigned step) {
  return v.x == step && v.y == step && v.z == step && v.w == step;
}

// Spins until `done()`; after one wait that was given up no other is begun, so that a kernel ends
// in about the time of one.
struct Waiter {
  unsigned* broken;
  bool given_up = false;

  template <typename Done>
  __device__ __forceinline__ void wait(Done done) {
    for (unsigned poll = 0; !given_up && !done(); ++poll) {
      if (poll == kPolls) {
        given_up = true;
        *broken = 1;
      }
    }
  }
};

// ---- kernels -------------------------------------------------------------------------------

__global__ void empty() {}

__global__ void grid_sync(int steps) {
  auto grid = cooperative_groups::this_grid();
  for (int step = 0; step < steps; ++step) grid.sync();
}

// A barrier of our own: each block adds to one counter, its first thread polls it.
__global__ void counter_barrier(unsigned* counter, int steps, unsigned* broken) {
  Waiter waiter{broken};
  for (unsigned step = 1; step <= unsigned(steps); ++step) {
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(counter);
      waiter.wait([&] { return load_acquire(counter) >= step * gridDim.x; });
    }
    __syncthreads();
  }
}

// Block 0 and block `partner` answer each other: two hops a step. The flags lie 256 bytes apart.
__global__ void flag_hop(unsigned* flags, int partner, int steps, unsigned* broken) {
  const bool first = blockIdx.x == 0;
  if (threadIdx.x != 0 || !(first || int(blockIdx.x) == partner)) return;
  unsigned* mine = flags + (first ? 0 : 64);
  const unsigned* other = flags + (first ? 64 : 0);
  Waiter waiter{broken};
  for (unsigned step = 1; step <= unsigned(steps); ++step) {
    if (first) store_release(mine, step);
    waiter.wait([&] { return load_acquire(other) == step; });
    if (!first) store_release(mine, step);
  }
}

// The same with 16 bytes of data that are polled themselves.
__global__ void data_hop(uint4* data, int partner, int steps, unsigned* broken) {
  const bool first = blockIdx.x == 0;
  if (threadIdx.x != 0 || !(first || int(blockIdx.x) == partner)) return;
  uint4* mine = data + (first ? 0 : 16);
  const uint4* other = data + (first ? 16 : 0);
  Waiter waiter{broken};
  for (unsigned step = 1; step <= unsigned(steps); ++step) {
    if (first) store_relaxed(mine, make_uint4(step, step, step, step));
    waiter.wait([&] { return arrived(load_relaxed(other), step); });
    if (!first) store_relaxed(mine, make_uint4(step, step, step, step));
  }
}

// One exchange of the hidden state: every block publishes `own` 16-byte chunks and gathers all
// `total` into shared memory, kChunks a thread, polling the data. Two buffers in turn: a block can
// overwrite step t only after it has step t + 1 of everyone, who then all had step t.
template <int kChunks>
__global__ void all_gather(uint4* buffers, int own, int total, int steps, unsigned* broken) {
  extern __shared__ uint4 gathered[];
  Waiter waiter{broken};
  for (unsigned step = 1; step <= unsigned(steps); ++step) {
    uint4* buffer = buffers + (step & 1) * total;
    if (int(threadIdx.x) < own) {
      store_relaxed(buffer + blockIdx.x * own + threadIdx.x, make_uint4(step, step, step, step));
    }
    uint4 chunk[kChunks];
    unsigned missing = (1u << kChunks) - 1;
    waiter.wait([&] {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (missing >> i & 1) {
          const int at = threadIdx.x + i * kThreads;
          chunk[i] = at < total ? load_relaxed(buffer + at) : make_uint4(step, step, step, step);
        }
      }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (arrived(chunk[i], step)) missing &= ~(1u << i);
      }
      return missing == 0;
    });
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < total) gathered[at] = chunk[i];
    }
    __syncthreads();
  }
}

// Release and acquire cost a fence of the whole GPU; relaxed is the barrier alone.
template <bool kRelaxed>
__global__ void cluster_barrier(int steps) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  for (int step = 0; step < steps; ++step) {
    if (kRelaxed) {
      asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    } else {
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
  }
#endif
}

// Every block reads the same kChunks x blockDim.x x 16 bytes again and again, past L1. With kSync
// a round begins when the last has arrived, as the steps of a recurrence do.
template <int kChunks, bool kSync>
__global__ void read_l2(const uint4* data, int rounds, unsigned* sink) {
  unsigned sum = 0;
  for (int round = 0; round < rounds; ++round) {
    uint4 chunk[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunk[i] = load_relaxed(data + threadIdx.x + i * blockDim.x);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) sum += chunk[i].x ^ chunk[i].y ^ chunk[i].z ^ chunk[i].w;
    if (kSync) __syncthreads();
  }
  if (sum == 0x12345678u) *sink = sum;  // never: keeps the loads
}

// kThreads / 32 warps a block, four independent accumulators each: what one SM can multiply.
template <bool kBf16>
__global__ void mma_rate(int iterations, float* sink, long long* cycles) {
  float d[4][4];
  unsigned a[4], b[2];
  // Small numbers of both signs that differ by lane: zeros would run cooler.
  for (unsigned i = 0; i < 4; ++i) a[i] = 0x2c003c00u ^ (threadIdx.x * 0x00110013u) ^ (i << 15);
  for (unsigned i = 0; i < 2; ++i) b[i] = 0x3400ac00u ^ (threadIdx.x * 0x00090007u) ^ (i << 31);
  for (auto& row : d) row[0] = row[1] = row[2] = row[3] = 0;
  __syncthreads();
  const long long start = clock64();
  for (int iteration = 0; iteration < iterations; ++iteration) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kBf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = clock64() - start;
  float sum = 0;
  for (auto& row : d) sum += row[0] + row[1] + row[2] + row[3];
  if (sum == 1.2345f) *sink = sum;
}

}  // namespace
