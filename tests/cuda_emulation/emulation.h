// CUDA for the kernels of csrc/cuda, on the host and without a GPU: all that device.cuh and
// launch.cuh define, under the same names (compile with -DFUSED_LSTM_EMULATION).
//
// A launch runs the threads of all its blocks as fibres of one thread of the operating system, in
// an order drawn from a seed (schedule.cpp), so that what CUDA leaves open is tried out:
// - a fibre goes on until it waits (for a barrier, for the other lanes of its warp, for a word that
//   is not yet published), and under some policies until it calls any of these functions;
// - shared memory starts as NaNs, and ends at a page that nothing may touch;
// - a published word stays with its thread for a while, and words arrive in random order.
// What no CUDA kernel may do ends the launch with an error: lanes of a warp at different collective
// functions, threads of a block at different barriers, or gone; waiting for what never comes; a
// misaligned access; touching what is not mapped; publishing a word twice, or as "not yet".
//
// Not emulated: the order of ordinary loads and stores (they are sequentially consistent), and
// preemption between two of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "cuda/launch.h"
#include "numbers.h"

#define FUSED_LSTM_DEVICE inline
#define FUSED_LSTM_KERNEL(threads) void

namespace fused_lstm::cuda {
namespace emulation {

using Site = std::source_location;  // where in a kernel a function is called

// The running thread's place, and how many functions it may call before another thread's turn.
struct Running {
  int thread, threads, block, blocks;
  char* shared;
  int64_t turn;
};
extern Running running;

void take_turns();
inline void maybe_take_turns() {
  if (--running.turn < 0) take_turns();
}

// What the lanes of a warp do together: each brings an argument, and the last of them does the work
// for all.
enum Collective { kWarpBarrier, kAny, kShuffle, kMmaBf16, kMmaF16, kMmaTf32 };
struct Any {
  bool value;
};
struct Shuffle {
  uint32_t value;
  int mask;
};
struct Mma {
  float* d;
  const Words* a;
  uint32_t b[2];
};
void together(Collective what, void* argument, Site site);

// What a lane does to memory, noted where `counting` is on (counting.h).
enum Access { kLoad, kStore, kPublish, kPoll, kPrefetch };
extern bool counting;
void note(Access access, const void* at, size_t bytes, const Site& site);

void fail(const char* what);
inline void require_aligned(const void* at, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("misaligned access");
}

}  // namespace emulation

inline int thread_index() { return emulation::running.thread; }
inline int thread_count() { return emulation::running.threads; }
inline int block_index() { return emulation::running.block; }
inline int block_count() { return emulation::running.blocks; }
inline char* shared_memory() { return emulation::running.shared; }

void block_barrier(emulation::Site site = emulation::Site::current());
void warp_barrier(emulation::Site site = emulation::Site::current());

inline bool warp_any(bool value, emulation::Site site = emulation::Site::current()) {
  emulation::Any any{value};
  emulation::together(emulation::kAny, &any, site);
  return any.value;
}
inline uint32_t shuffle_xor(uint32_t value, int mask,
                            emulation::Site site = emulation::Site::current()) {
  emulation::Shuffle shuffle{value, mask};
  emulation::together(emulation::kShuffle, &shuffle, site);
  return shuffle.value;
}
inline float shuffle_xor(float value, int mask, emulation::Site site = emulation::Site::current()) {
  return bits_float(shuffle_xor(float_bits(value), mask, site));
}
inline double shuffle_xor(double value, int mask,
                          emulation::Site site = emulation::Site::current()) {
  uint32_t words[2];
  std::memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) word = shuffle_xor(word, mask, site);
  std::memcpy(&value, words, sizeof value);
  return value;
}

inline void mma_bf16(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1,
                     emulation::Site site = emulation::Site::current()) {
  emulation::Mma mma{d, &a, {b0, b1}};
  emulation::together(emulation::kMmaBf16, &mma, site);
}
inline void mma_f16(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1,
                    emulation::Site site = emulation::Site::current()) {
  emulation::Mma mma{d, &a, {b0, b1}};
  emulation::together(emulation::kMmaF16, &mma, site);
}
inline void mma_tf32(float (&d)[4], const Words& a, uint32_t b0, uint32_t b1,
                     emulation::Site site = emulation::Site::current()) {
  emulation::Mma mma{d, &a, {b0, b1}};
  emulation::together(emulation::kMmaTf32, &mma, site);
}

template <class T>
inline T load_element(const T* at, emulation::Site site = emulation::Site::current()) {
  emulation::maybe_take_turns();
  if (emulation::counting) emulation::note(emulation::kLoad, at, sizeof(T), site);
  return *at;
}
template <class T>
inline void store_element(T* at, T value, emulation::Site site = emulation::Site::current()) {
  emulation::maybe_take_turns();
  if (emulation::counting) emulation::note(emulation::kStore, at, sizeof(T), site);
  *at = value;
}
inline Words load_words(const void* at, emulation::Site site = emulation::Site::current()) {
  emulation::require_aligned(at, 16);
  return load_element(static_cast<const Words*>(at), site);
}
inline void store_words(void* at, const Words& words,
                        emulation::Site site = emulation::Site::current()) {
  emulation::require_aligned(at, 16);
  store_element(static_cast<Words*>(at), words, site);
}
Words load_published(const void* at, emulation::Site site = emulation::Site::current());
inline void load_published(bool wanted, const void* at, Words& words,
                           emulation::Site site = emulation::Site::current()) {
  if (wanted) words = load_published(at, site);
}
inline Words load_published_or_zero(bool wanted, const void* at,
                                    emulation::Site site = emulation::Site::current()) {
  return wanted ? load_published(at, site) : Words{};
}
void publish(void* at, uint32_t word, emulation::Site site = emulation::Site::current());
inline void prefetch(const void* at, emulation::Site site = emulation::Site::current()) {
  if (emulation::counting) emulation::note(emulation::kPrefetch, at, 1, site);
  volatile char there = *static_cast<const char*>(at);  // what is not mapped is a fault
  (void)there;
}

// As the settings say: by so much more at each look.
uint32_t milliseconds();
[[noreturn]] void give_up();

// --- launches ------------------------------------------------------------------------------------

namespace emulation {
const char* run(const Grid& grid, void (*thread)(const void* call), const void* call);
int resident(const Grid& grid);
}  // namespace emulation

// Runs kernel(params) to its end.
template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, Stream, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  };
  const Call call{kernel, params};
  const auto thread = [](const void* at) {
    const Call& c = *static_cast<const Call*>(at);
    c.kernel(c.params);
  };
  return emulation::run(grid, thread, &call);
}

template <class Params>
int resident_blocks(void (*)(Params), const Grid& grid) {
  return emulation::resident(grid);
}

}  // namespace fused_lstm::cuda
