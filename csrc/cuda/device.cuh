// Every device-side primitive the kernels use, as one inline function each. With
// FUSED_LSTM_EMULATION the header of the same functions for the host takes their place
// (tests/cuda_emulation/emulation.h), so kernels use nothing of CUDA but what is here.
#pragma once

#include <cstdint>

namespace fused_lstm::cuda {

// 16 bytes: what one lane loads of weights and states at a time.
struct alignas(16) Words {
  uint32_t word[4];
};

}  // namespace fused_lstm::cuda

#ifdef FUSED_LSTM_EMULATION
#include "emulation.h"

#define FUSED_LSTM_PARAMS(Type) const Type

namespace fused_lstm::cuda {
inline int opaque(int value) { return value; }
}  // namespace fused_lstm::cuda
#else

#include <cuda_runtime.h>

#define FUSED_LSTM_DEVICE __device__ __forceinline__
// A kernel of at most `threads` threads, one block to a multiprocessor.
#define FUSED_LSTM_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace fused_lstm::cuda {

FUSED_LSTM_DEVICE int thread_index() { return threadIdx.x; }
FUSED_LSTM_DEVICE int thread_count() { return blockDim.x; }
FUSED_LSTM_DEVICE int block_index() { return blockIdx.x; }
FUSED_LSTM_DEVICE int block_count() { return gridDim.x; }

// The launch's dynamic shared memory.
FUSED_LSTM_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

FUSED_LSTM_DEVICE void block_barrier() { __syncthreads(); }
FUSED_LSTM_DEVICE void warp_barrier() { __syncwarp(); }
FUSED_LSTM_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }
FUSED_LSTM_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
FUSED_LSTM_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
FUSED_LSTM_DEVICE double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

FUSED_LSTM_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
FUSED_LSTM_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
FUSED_LSTM_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }

// Ordinary loads and stores, of one element, and of 16 bytes, aligned.
template <class T>
FUSED_LSTM_DEVICE T load_element(const T* at) {
  return *at;
}
template <class T>
FUSED_LSTM_DEVICE void store_element(T* at, T value) {
  *at = value;
}
FUSED_LSTM_DEVICE Words load_words(const void* at) {
  const uint4 v = *static_cast<const uint4*>(at);
  return {v.x, v.y, v.z, v.w};
}
FUSED_LSTM_DEVICE void store_words(void* at, const Words& v) {
  *static_cast<uint4*>(at) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// What blocks tell each other goes through L2, past the multiprocessors' own caches. Each 32-bit
// word is written and read whole; nothing is said of the order between words. Where it is not
// wanted, `v` stays as it is: by a predicate and not by a branch, which costs 50 cycles.
FUSED_LSTM_DEVICE void load_published(bool wanted, const void* at, Words& v) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
      : "l"(__cvta_generic_to_global(at)), "r"(uint32_t(wanted))
      : "memory");
}
// The same, and zeros where it is not wanted.
FUSED_LSTM_DEVICE Words load_published_or_zero(bool wanted, const void* at) {
  Words v;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
      "@p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
      : "l"(__cvta_generic_to_global(at)), "r"(uint32_t(wanted))
      : "memory");
  return v;
}
FUSED_LSTM_DEVICE void publish(void* at, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(at)), "r"(word)
               : "memory");
}

// Asks L2 to have the sector of global memory that this address is in; nobody waits for it.
FUSED_LSTM_DEVICE void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
}

// d += a b for one 16 x 8 tile: a is a fragment of the 16 rows, b of the 8 columns (PTX ISA,
// mma.m16n8k16 and mma.m16n8k8).
FUSED_LSTM_DEVICE void mma_bf16(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}
FUSED_LSTM_DEVICE void mma_f16(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}
FUSED_LSTM_DEVICE void mma_tf32(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

// Conversions round to nearest, ties to even (tf32: away); a NaN becomes 0x7fff (tf32: 0x7fffffff).
FUSED_LSTM_DEVICE uint16_t float_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FUSED_LSTM_DEVICE uint16_t float_to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
FUSED_LSTM_DEVICE float bf16_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }
FUSED_LSTM_DEVICE float f16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
FUSED_LSTM_DEVICE float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits_float(bits);
}

// Within 2 units in the last place of float, and exact at the limits: 2^x and 1 / x by the special
// function unit.
FUSED_LSTM_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_LSTM_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSED_LSTM_DEVICE float exact_exp(float x) { return expf(x); }
FUSED_LSTM_DEVICE float exact_tanh(float x) { return tanhf(x); }
FUSED_LSTM_DEVICE double exact_exp(double x) { return exp(x); }
FUSED_LSTM_DEVICE double exact_tanh(double x) { return tanh(x); }

// Of a clock that all multiprocessors share, which begins anew after 52 days.
FUSED_LSTM_DEVICE uint32_t milliseconds() {
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return uint32_t((nanoseconds >> 10) / 977);
}

// Ends the launch with an error that the next CUDA call reports.
FUSED_LSTM_DEVICE void give_up() { __trap(); }

}  // namespace fused_lstm::cuda

// A kernel's parameters stay in constant memory, also where their address is taken.
#define FUSED_LSTM_PARAMS(Type) const __grid_constant__ Type

namespace fused_lstm::cuda {

// The same number, of which the compiler knows nothing: what is looked up by it is looked up again
// at each turn of a loop, where it would otherwise take registers for the whole of it.
FUSED_LSTM_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace fused_lstm::cuda
#endif
