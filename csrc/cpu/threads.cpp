#include "threads.h"

#include <chrono>

#include "block_cache.h"
#include "crowd.h"

namespace fused_lstm::cpu {

// One block for each calling thread, as large as its largest call yet: mapping a few MB anew costs
// as much as a short sequence. Weights' size and a few rows, never T. The packed weights are read
// at every step, and where they are larger than the second-level cache, from few pages.
void* workspace(int64_t bytes) {
  struct Workspace {
    BlockCache::Block block{nullptr, 0};
    ~Workspace() { clear(); }
    void clear() {
      if (block.data) BlockCache::unmap(block);
      block = {nullptr, 0};
    }
  };
  static thread_local Workspace own;
  if (int64_t(own.block.bytes) < bytes) {
    own.clear();
    own.block = BlockCache::map(size_t(bytes));
  }
  return own.block.data;
}

int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

Threads::Threads(int64_t products, int wanted)
    : began_(wanted > 1 ? nanoseconds() : 0),
      short_(products < 64'000'000),
      crew_{1, !impatient.load(std::memory_order_relaxed)} {
  if (wanted > 1 && !declined(products)) crew_.threads = thread_limit(wanted, processors());
}

bool Threads::declined(int64_t products) const {
  static Pace pace;
  const bool too_brief =
      products < 16'000'000 && !pace.quick(began_) && !any_pace.load(std::memory_order_relaxed);
  return too_brief || (crew_.patient && contention_of(short_).paused(began_));
}

Contention& Threads::contention_of(bool short_ones) {
  static Contention of_short_calls(20'000'000), of_long_ones(50'000'000);
  return short_ones ? of_short_calls : of_long_ones;
}

void Threads::report(Waits waits) const {
  if (crew_.threads == 1 || !crew_.patient) return;
  const int64_t now = nanoseconds();
  static Queue queue(now);
  const bool waited = waits == kLost || (short_ && waits == kStalled);
  contention_of(short_).report(waited && queue.stood_in(now), began_, now);
  if (contention_of(true).lasts(now) || contention_of(false).lasts(now))
    keep_crowd(crew_.threads);
  else
    dismiss_crowd();
}

}  // namespace fused_lstm::cpu
