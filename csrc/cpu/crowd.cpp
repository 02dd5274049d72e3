#include "crowd.h"

#if defined(__linux__) && defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "processors.h"

namespace fused_lstm::cpu {
namespace {

// A team of few on a machine of many would need more threads than it is worth.
constexpr int kLargest = 64;

// Of a process, never destroyed: its thread may outlive whatever is destroyed at the end.
struct Crowd {
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<bool> wanted{false};
  bool there = false;  // its thread, which ends when it is no longer wanted

  // libgomp counts the threads of a team for as long as the thread that began it lives.
  void stay(int threads) {
#pragma omp parallel num_threads(threads)
    std::atomic_signal_fence(std::memory_order_seq_cst);  // not nothing, which would be left out
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return !wanted; });
    there = false;
  }
};

Crowd& crowd() {
  static Crowd* of_process = new Crowd;
  return *of_process;
}

}  // namespace

void keep_crowd(int threads) {
  Crowd& mine = crowd();
  if (mine.wanted.load(std::memory_order_relaxed)) return;
  // One above the processors, together with that team's; the one that starts it isn't counted.
  const int least = processors().affinity - threads + 2;
  if (least > kLargest) return;
  std::lock_guard<std::mutex> lock(mine.mutex);
  mine.wanted = true;
  if (mine.there) return;
  try {
    std::thread([&mine, least] { mine.stay(least); }).detach();
    mine.there = true;
  } catch (const std::system_error&) {  // no more threads are to be had: then without
  }
}

void dismiss_crowd() {
  Crowd& mine = crowd();
  if (!mine.wanted.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(mine.mutex);
  mine.wanted = false;
  mine.changed.notify_one();
}

}  // namespace fused_lstm::cpu
#else
namespace fused_lstm::cpu {
void keep_crowd(int) {}
void dismiss_crowd() {}
}  // namespace fused_lstm::cpu
#endif
