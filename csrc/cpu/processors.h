// How many processors this process may really use, and so how many threads a call may have.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace fused_lstm::cpu {

// The processors' time that control groups grant this process, in processors; 0 where it is not
// limited. Version 2 and version 1, the tightest of its group and those above.
//
// proc_cgroup: a file as /proc/self/cgroup. mount: where the groups are, as /sys/fs/cgroup.
double processor_quota(const std::string& proc_cgroup, const std::string& mount);

struct Processors {
  int affinity;  // that this thread may be scheduled on
  double quota;  // of time, in processors; 0: no limit
  int cap;       // FUSED_LSTM_THREADS; 0: not set
  bool forked;   // off a process that had several threads: OpenMP's would be waited for in vain
};

// As they are now. The quota and the cap are read once a process.
Processors processors();

// Threads for a call when torch has `wanted`: no more than processors, quota and cap allow; one in
// a forked child. A quota of 1.5 counts as 2: half of the time both run.
int thread_limit(int wanted, const Processors& found);

// Several threads are worth having only while each has a processor. Where a call lost more time in
// waiting for one than they save, other programs want the processors: calls of its kind then
// take one thread for a while, twice as long each time that trying again ends soon in the same way.
// Results do not depend on it. Any thread may call; a lost update costs a call's time at most.
class Contention {
 public:
  // first: nanoseconds of the first pause.
  explicit Contention(int64_t first) : first_(first) {}
  // At time `now`, in nanoseconds.
  bool paused(int64_t now) const { return now < until_.load(std::memory_order_relaxed); }
  // How a call of several threads went.
  void report(bool stalled, int64_t now);

 private:
  static constexpr int64_t kLongest = 2'000'000'000;  // nanoseconds
  const int64_t first_;
  std::atomic<int64_t> until_{0}, pause_{0};
};

// Not Crew::patient in all calls to come.
extern std::atomic<bool> impatient;

}  // namespace fused_lstm::cpu
