// How a call is shared out: threads = directions x row groups x unit groups.
//
// Rows (sequences of the batch) and directions never meet, so groups of them run the whole sequence
// without waiting. Threads of one unit group each own a range of hidden units, keep that share of
// the weights in their own cache and meet at a barrier every step. Weights that fit one core's L2
// are therefore split by rows, larger ones by units.
#pragma once

#include <limits.h>
#include <time.h>

#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../lstm.h"
#include "dispatch.h"
#include "packing.h"
#include "seats.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

constexpr int64_t kCacheBytes =
    768 << 10;  // of an L2 of 1 MB or more; the rest holds states and buffers
constexpr int64_t kNearBytes = 2 * kCacheBytes;  // of a thread's weights, above which they are far
constexpr int64_t kParallelProducts =
    400000;  // multiply-adds of a whole call below which one thread is faster
// Multiply-adds of a step below which a meeting costs more than it saves. B 1, two threads over one:
// in float H 64 0.84, H 80 1.0, H 96 1.13; where the product takes pairs of 16-bit numbers H 96
// 0.75, H 128 0.92, H 144 1.2.
template <class Gemm>
constexpr int64_t kSharedProducts = Gemm::kStepK == 2 ? 150000 : 50000;
// Of a step below which two threads' meeting (1.1 us) costs more than half as many rows a tile: B 4
// T 200 I 96 H 96, two layers, two threads: 1.17 to 1.05 ms.
constexpr int64_t kBriefProducts = 500000;

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

FUSED_LSTM_INLINE Range share(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

// The order in which a step takes its blocks: there, and with few rows back in every other step,
// for what a cache has kept of weights larger than it is what was read last. With many rows the
// next block is fetched in time whatever the order, and ascending addresses are 7 % faster.
class Order {
 public:
  Order(const Range& blocks, bool back) : blocks_(blocks), back_(back) {}
  static bool turns(int64_t rows, int64_t element_bytes) { return rows * element_bytes <= 128; }

  int64_t count() const { return blocks_.end - blocks_.begin; }
  int64_t operator[](int64_t i) const { return back_ ? blocks_.end - 1 - i : blocks_.begin + i; }
  // The block behind the i-th; the last one itself, with which the next step begins where it turns.
  int64_t following(int64_t i) const { return (*this)[i + 1 < count() ? i + 1 : i]; }

 private:
  Range blocks_;
  bool back_;
};

// One direction's work at a step.
struct StepWork {
  int64_t products;      // multiply-adds
  int64_t fewest;        // kSharedProducts
  int64_t weight_bytes;  // that are read at each
  int64_t tile_rows;
  int64_t blocks;  // of hidden units: tiles across
};

struct Team {
  int directions = 1, row_groups = 1, unit_groups = 1;
  bool helps = false;  // who has done its blocks of a step does others' (claims.h)

  int threads() const { return directions * row_groups * unit_groups; }
  // Threads that help at so many directions, each counted in every one.
  int64_t helpers(int of_directions) const {
    return helps ? of_directions * row_groups * unit_groups : 0;
  }

  static Team choose(int threads, int directions, const Sequence& seq, const StepWork& step) {
    Team team;
    if (threads <= 1 || step.products * seq.T * directions < kParallelProducts) return team;
    team.directions = directions;
    const int64_t rest = threads / directions;
    int64_t units = round_up(step.weight_bytes, kCacheBytes) / kCacheBytes;
    if (units > rest) units = rest;
    if (units < 1) units = 1;
    int64_t rows = rest / units;
    int64_t row_blocks = (seq.B + step.tile_rows - 1) / step.tile_rows;
    if (step.products < kBriefProducts && seq.B >= 4 && row_blocks < seq.B / 2)
      row_blocks = seq.B / 2;
    if (rows > row_blocks) rows = row_blocks;
    if (rows < 1) rows = 1;
    units = rest / rows;
    if (units > step.blocks) units = step.blocks;
    if (step.products < step.fewest) units = 1;
    team.row_groups = int(rows);
    team.unit_groups = int(units);
    team.helps = units > 1 && step.products >= kBriefProducts;
    return team;
  }
};

// A thread's place in the team.
struct Place {
  int direction, row_group, unit_group;

  Place(const Team& team, int thread)
      : direction(thread / (team.row_groups * team.unit_groups)),
        row_group(thread / team.unit_groups % team.row_groups),
        unit_group(thread % team.unit_groups) {}
};

FUSED_LSTM_INLINE int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// A number that threads wait to see changed.
//
// A waiting thread spins for some 10 to 20 us, longer than threads of equal shares wait for each
// other when both are running. Then it yields, for the one that it waits for may want this
// processor, and then sleeps: whoever has slept is scheduled before those that have computed
// meanwhile.
struct Signal {
  static constexpr int kSpins = 512;
  static constexpr int64_t kStallNs = 500000;  // a sleeping thread wakes in 100 us at most

  int value, asleep;
  int stalled;   // somebody waited for longer than kStallNs
  int64_t lost;  // by all that waited, in stalls over twice as long as their own work

  int now() const { return __atomic_load_n(&value, __ATOMIC_ACQUIRE); }

  void add_one() {
    __atomic_add_fetch(&value, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) wake();
  }

  // Until the value is no longer `before`. This thread's own work, before it waited, began at
  // `began`.
  void wait_while(int before, int64_t began) {
    for (int spins = 0; now() == before; ++spins) {
      if (spins == kSpins) {
        wait_long(before, began);
        return;
      }
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

 private:
  void wait_long(int before, int64_t began) {
    const int64_t since = nanoseconds();
    int64_t waited = 0;
    while (now() == before) {
      if (waited < kStallNs) {
        sched_yield();
      } else {
        __atomic_store_n(&stalled, 1, __ATOMIC_RELAXED);
        sleep(before);
      }
      waited = nanoseconds() - since;
    }
    // the wait for a share up to three times as large is no stall
    if (waited > kStallNs && waited > 2 * (since - began))
      __atomic_add_fetch(&lost, waited, __ATOMIC_RELAXED);
  }

#if defined(__linux__)
  // Returns at once where the value is no longer `before`.
  void sleep(int before) {
    __atomic_add_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
    __atomic_sub_fetch(&asleep, 1, __ATOMIC_SEQ_CST);
  }
  void wake() { syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int) { sched_yield(); }
  void wake() {}
#endif
};

// Where threads meet; the value counts their meetings.
//
// Beside busy processes every step waits for whoever has lost its processor, for milliseconds.
// Where that has cost more than several threads save in the whole pass, the last to arrive, which
// has a processor, goes on alone.
struct alignas(64) Barrier : Signal {
  int arrived;
  int alone;         // whoever came last has gone on alone
  int64_t patience;  // nanoseconds lost after which it does; 0: never
  int64_t released;  // when that began

  // The threads that go on: all, 1 (this one alone) or 0 (another alone).
  int wait(int threads) { return threads == 1 ? 1 : wait_for_others(threads); }

  bool out_of_patience() const {
    return patience && __atomic_load_n(&lost, __ATOMIC_RELAXED) > patience;
  }

 private:
  // One copy: inlined at each meeting it is 22 of AVX2's 630 KB of code.
  __attribute__((noinline)) int wait_for_others(int threads) {
    const int before = now();
    const int64_t began = released;
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      if (patience) {
        alone = out_of_patience();
        released = nanoseconds();
      }
      const int going_on = alone ? 1 : threads;
      add_one();
      return going_on;
    }
    wait_while(before, began);
    return alone ? 0 : threads;
  }
};

// Nanoseconds lost in a pass of so many multiply-adds after which one thread does the rest: about
// what two threads save.
FUSED_LSTM_INLINE int64_t patience(int64_t products) { return Barrier::kStallNs + products / 100; }

// Hands out cache-line-aligned pieces of the workspace; on a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* piece = base ? base + used : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
};

// The panel that a thread reads next in a step, brought to its second-level cache line by line
// while it works on the rows of the panel before, which the first of them has brought there. Only
// for weights that are beyond that cache: B 20 H 1150 forward in float 81 to 65 ms, B 32 H 512 29
// to 26.
class NextPanel {
 public:
  NextPanel(bool far, const void* panel, int64_t bytes)
      : at_(far ? static_cast<const char*>(panel) : nullptr), end_(at_ + (far ? bytes : 0)) {}

  // What a tile of so many steps of K is to fetch; null where all is on its way.
  const void* part(int64_t steps) {
    if (at_ >= end_) return nullptr;
    const char* begin = at_;
    at_ += steps * kLine;
    return begin;
  }
  // As many lines now: for a product that fetches none, between whose tiles memory would be idle.
  void fetch(int64_t lines) {
    for (; lines > 0 && at_ < end_; --lines, at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }
  int64_t lines() const { return (end_ - at_) / kLine; }

 private:
  const char *at_, *end_;
};

// A pass's barriers, in its workspace: one for all its threads, then one for each group that meets
// at every step.
struct Barriers {
  Barrier* first = nullptr;
  int64_t count = 0;

  void take(Arena& arena, int64_t wanted) {
    count = wanted;
    first = arena.take<Barrier>(count);
  }
  void clear(int64_t patience, int64_t now) {
    memset(first, 0, sizeof(Barrier) * size_t(count));
    for (int64_t index = 0; index < count; ++index) first[index].released = now;
    for (int64_t index = 1; index < count; ++index) first[index].patience = patience;
  }
  Barrier& operator[](int64_t index) const { return first[index]; }
  Waits waits() const {
    Waits worst = kShortWaits;
    for (int64_t index = 0; index < count; ++index) {
      if (first[index].alone || (index == 0 && first[index].lost)) return kLost;
      if (first[index].stalled) worst = kStalled;
    }
    return worst;
  }
};

// body(thread) on every thread of the team, or on none, and false, where OpenMP grants fewer: the
// barriers need them all. They meet at `end`, for OpenMP's own barrier spins for milliseconds and
// would keep a thread's processor from the one that it waits for.
template <class Body>
static bool run_team(int threads, Barrier& end, const Body& body) {
  if (threads == 1) {
    body(0);
    return true;
  }
#if defined(__SANITIZE_THREAD__)  // which knows nothing of how OpenMP's threads wait for each other
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread)
    others.emplace_back([&, thread] {
      body(thread);
      end.wait(threads);
    });
  body(0);
  end.wait(threads);
  for (std::thread& other : others) other.join();
  return true;
#elif defined(_OPENMP)
  bool complete = true;
  Seats seats;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      seats.take();
      body(omp_get_thread_num());
      end.wait(threads);
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  return complete;
#else
  return false;
#endif
}

// Columns of a plain product (not gates) cut into blocks of up to four vectors.
struct ColumnBlocks {
  int64_t columns = 0;
  int lanes = 1, vectors = 1;

  ColumnBlocks() = default;
  // As wide as leaves the busiest of `parts` threads the least to do, of `most` vectors at most.
  ColumnBlocks(int64_t columns, int lanes, int parts, int most = kMaxVectors)
      : columns(columns), lanes(lanes) {
    const int64_t all = round_up(columns, lanes) / lanes;
    int64_t best = INT64_MAX;
    for (int v = most; v >= 1; --v) {
      const int64_t blocks = (all + v - 1) / v;
      const int64_t widest = (blocks + parts - 1) / parts * v;
      const int64_t cost = widest < all ? widest : all;
      if (cost < best) {
        best = cost;
        vectors = v;
      }
    }
  }

  int64_t count() const { return (columns + width() - 1) / width(); }
  int width() const { return vectors * lanes; }
  int64_t first(int64_t block) const { return block * width(); }
  int vectors_of(int64_t block) const {
    const int64_t left = round_up(columns - first(block), lanes) / lanes;
    return left < vectors ? int(left) : vectors;
  }
  int64_t padded() const { return round_up(columns, lanes); }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
