// The threads and the scratch memory of one pass of the kernels. No torch.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "processors.h"

namespace fused_lstm::cpu {

// Scratch memory of the calling thread, kept from call to call: valid until its next one.
void* workspace(int64_t bytes);

int64_t nanoseconds();

// How many threads a call takes, and what they tell the next of its kind. Short calls are one to
// two milliseconds on one thread, and one stall is more than they save. In long ones waits must
// cost as much as several threads save: see Barrier. Brief ones are less than 1 ms: see Pace.
class Threads {
 public:
  // products: multiply-adds of the call. wanted: threads, where this process may use as many.
  Threads(int64_t products, int wanted);

  int count() const { return crew_.threads; }

  // A pass with these arguments, in a workspace of its size.
  template <class Args>
  void run(int64_t (*bytes)(const Args*, int, int), Waits (*pass)(const Args*, int, Crew, void*),
           const Args* args, int directions) const {
    report(pass(args, directions, crew_, workspace(bytes(args, directions, crew_.threads))));
  }

 private:
  // Whether there is cause to take one thread only.
  bool declined(int64_t products) const;
  static Contention& contention_of(bool short_ones);
  void report(Waits waits) const;

  int64_t began_;
  bool short_;
  Crew crew_;
};

}  // namespace fused_lstm::cpu
