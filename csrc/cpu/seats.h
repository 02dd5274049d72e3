// A processor for each thread of a team.
#pragma once

#include <sched.h>

#include <cstdint>

#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Threads that were asleep are often woken on the processor of the one that woke them. Both then
// run in turns of milliseconds, and whoever waits for the other spins in its turn. So each thread
// claims the processor that it finds itself on, and moves to a free one where another has claimed
// it: two system calls, some 10 us, and only then.
class Seats {
 public:
  void take() {
#if defined(__linux__)
    if (claim(sched_getcpu())) return;
    cpu_set_t allowed, free;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    CPU_ZERO(&free);
    for (int processor = 0; processor < kMost; ++processor)
      if (CPU_ISSET(processor, &allowed) && !claimed(processor)) CPU_SET(processor, &free);
    // Fails where none is free. The first call moves the thread at once; after the second it may
    // run wherever it might before.
    if (sched_setaffinity(0, sizeof free, &free) != 0) return;
    sched_setaffinity(0, sizeof allowed, &allowed);
    claim(sched_getcpu());
#endif
  }

#if defined(__linux__)
 private:
  static constexpr int kMost = CPU_SETSIZE;

  bool claimed(int processor) const {
    return __atomic_load_n(&words_[processor / 64], __ATOMIC_RELAXED) >> processor % 64 & 1;
  }
  // False where another thread has it.
  bool claim(int processor) {
    if (processor < 0 || processor >= kMost) return true;
    const uint64_t bit = uint64_t(1) << processor % 64;
    return !(__atomic_fetch_or(&words_[processor / 64], bit, __ATOMIC_RELAXED) & bit);
  }

  uint64_t words_[kMost / 64] = {};
#endif
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
