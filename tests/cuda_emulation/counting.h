// What a launch asks of a multiprocessor and of L2, counted where the threads run anyway: of block
// 0, by the rules of the hardware as NVIDIA documents them or as they are known from measurements.
//
// One warp instruction is what the lanes of a warp do at one place of the source (the n-th time,
// between two collective functions). Of each:
// - shared memory: 32 banks of 4 bytes; lanes are served all at once for accesses of 4 bytes and
//   less, 16 at a time for 8 bytes, 8 at a time for 16 bytes; each time takes as many wavefronts as
//   the bank with the most distinct words has of them, at least one;
// - global memory: distinct sectors of 32 bytes.
// A trip is a load's way to L2 and back. All loads of a warp are taken to share one scoreboard,
// as the compiler mostly arranges it: whatever uses a loaded value (a collective function, a store
// of 16 bytes) waits for all loads issued before it. A word that another block publishes sets out
// when that block has made its own trips. The longest path through all of this, block barriers
// included, is counted twice: in trips to L2, and in those of them that go on to memory, for a
// sector that nobody has read, written by an ordinary store or prefetched in this launch. (What
// fill() and publish() leave is taken for evicted or incomplete, as it is in a long sequence.)
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace fused_lstm::cuda::emulation {

struct Tally {
  int64_t wavefronts = 0, least_wavefronts = 0;  // of shared memory
  int64_t sectors_read = 0, sectors_written = 0, sectors_prefetched = 0;
  int64_t polled = 0;                 // of the sectors read, those that other blocks publish
  int64_t mma = 0;                    // of the warp that has most
  int64_t barriers = 0;               // of the whole block
  int64_t trips = 0, cold_trips = 0;  // on the longest path: to L2, and on to memory
};

extern Tally tally;  // of the latest launch that had block barriers

void start_count(int blocks, int threads, int shared_bytes);
void end_count();
void count_collective(Collective what);  // of the running warp, when all lanes are there
void count_barrier();                    // of the running block

}  // namespace fused_lstm::cuda::emulation
