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

// Whether other programs want the processors: whether this process's threads have stood in line for
// one for a twentieth of the time since the last question, as Linux counts it in each one's
// schedstat. Where a virtual machine loses a processor for some milliseconds, threads wait for each
// other as long, but nobody stands in line, and one thread would be slower still. Any thread may
// call.
class Queue {
 public:
  explicit Queue(int64_t now, std::string tasks = "/proc/self/task");
  // At time `now`, in nanoseconds; true where Linux doesn't say, or it isn't Linux.
  bool stood_in(int64_t now);

 private:
  static constexpr int64_t kLeast = 1'000'000;  // nanoseconds: a time slice is three times as long
  const std::string tasks_;
  std::atomic<int64_t> asked_, before_;
};

// Several threads are worth having only while each has a processor. Where a call lost more time in
// waiting for one than they save, other programs want the processors: calls of its kind then
// take one thread for a while, twice as long each time that trying again ends at once in the same
// way. Results do not depend on it. Any thread may call; a lost update costs a call's time at most.
class Contention {
 public:
  // first: nanoseconds of the first pause.
  explicit Contention(int64_t first) : first_(first) {}
  // At time `now`, in nanoseconds.
  bool paused(int64_t now) const { return now < until_.load(std::memory_order_relaxed); }
  // Whether it was no accident: trying again has ended in the same way, and has not gone well for as
  // long as the last pause since.
  bool lasts(int64_t now) const {
    const int64_t pause = pause_.load(std::memory_order_relaxed);
    return pause > first_ && now < until_.load(std::memory_order_relaxed) + pause;
  }
  // How a call of several threads went that began at `began`.
  void report(bool stalled, int64_t began, int64_t now);

 private:
  static constexpr int64_t kLongest = 2'000'000'000;  // nanoseconds
  // After as long without a stall it is an accident: a virtual processor may be taken away for 5 ms
  // once in a second, and every pause be followed by another within its own length.
  static constexpr int64_t kWell = 100'000'000;
  const int64_t first_;
  std::atomic<int64_t> until_{0}, pause_{0};
};

// Whether brief calls follow one upon the other. To wake another thread takes as long as a brief
// call, and where it wakes on a processor that is in use, a time slice: those that come after a
// rest take one thread, and several once enough of them have come in a row. OpenMP's threads then
// wait awake for the next. Results do not depend on it. Any thread may call.
class Pace {
 public:
  static constexpr int kCalls = 16;              // in a row
  static constexpr int64_t kRestNs = 3'000'000;  // OpenMP's threads are awake for 10 ms

  // A call begins at `now`, in nanoseconds.
  bool quick(int64_t now) {
    const bool follows = now - last_.exchange(now, std::memory_order_relaxed) < kRestNs;
    const int before = follows ? before_.load(std::memory_order_relaxed) : 0;
    if (before < kCalls) before_.store(before + 1, std::memory_order_relaxed);
    return before == kCalls;
  }

 private:
  std::atomic<int64_t> last_{INT64_MIN / 2};
  std::atomic<int> before_{0};
};

// For tests. Not Crew::patient in all calls to come; brief calls take several threads at any pace.
extern std::atomic<bool> impatient, any_pace;

}  // namespace fused_lstm::cpu
