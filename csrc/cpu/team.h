// How a call is shared out: threads = directions x row groups x unit groups.
//
// Rows (sequences of the batch) and directions never meet, so groups of them run the whole sequence
// without waiting. Threads of one unit group each own a range of hidden units, keep that share of
// the weights in their own cache and meet at a barrier every step. Weights that fit one core's L2
// are therefore split by rows, larger ones by units.
#pragma once

#include <time.h>

#include <cstdint>

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
#include "packing.h"
#include "seats.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

constexpr int64_t kCacheBytes =
    768 << 10;  // of an L2 of 1 MB or more; the rest holds states and buffers
constexpr int64_t kNearBytes = 2 * kCacheBytes;  // of a thread's weights, above which they are far
constexpr int64_t kParallelProducts =
    400000;  // multiply-adds of a whole call below which one thread is faster
constexpr int64_t kSharedProducts =
    30000;  // multiply-adds of a step below which a barrier costs more

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

FUSED_LSTM_INLINE Range share(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

struct Team {
  int directions = 1, row_groups = 1, unit_groups = 1;

  int threads() const { return directions * row_groups * unit_groups; }

  // step_products: multiply-adds of one direction's step; blocks: of hidden units (tiles across).
  static Team choose(int threads, int directions, const Sequence& seq, int64_t step_products,
                     int64_t weight_bytes, int64_t row_blocks, int64_t blocks) {
    Team team;
    if (threads <= 1 || step_products * seq.T * directions < kParallelProducts) return team;
    team.directions = directions;
    const int64_t rest = threads / directions;
    int64_t units = round_up(weight_bytes, kCacheBytes) / kCacheBytes;
    if (units > rest) units = rest;
    if (units < 1) units = 1;
    int64_t rows = rest / units;
    if (rows > row_blocks) rows = row_blocks;
    if (rows < 1) rows = 1;
    units = rest / rows;
    if (units > blocks) units = blocks;
    if (step_products < kSharedProducts) units = 1;
    team.row_groups = int(rows);
    team.unit_groups = int(units);
    return team;
  }
};

// A thread's place in the team.
struct Place {
  int thread, direction, row_group, unit_group;

  Place(const Team& team, int thread)
      : thread(thread),
        direction(thread / (team.row_groups * team.unit_groups)),
        row_group(thread / team.unit_groups % team.row_groups),
        unit_group(thread % team.unit_groups) {}
};

FUSED_LSTM_INLINE int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Spins for some 10 to 20 us, longer than threads of equal shares wait for each other when both are
// running. Then it yields: the one that it waits for may want this processor.
struct alignas(64) Barrier {
  static constexpr int kSpins = 512;
  static constexpr int64_t kStallNs = 500000;  // a sleeping thread wakes in 100 us at most

  int arrived;
  int generation;
  int stalled;  // somebody waited for longer than kStallNs

  void wait(int threads) {
    if (threads == 1) return;
    const int before = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, before + 1, __ATOMIC_RELEASE);
      return;
    }
    int64_t since = 0;
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == before; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        continue;
      }
      if (!since) since = nanoseconds();
      sched_yield();
      if (nanoseconds() - since > kStallNs) __atomic_store_n(&stalled, 1, __ATOMIC_RELAXED);
    }
  }
};

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

// The panel that a thread reads next, brought to its second-level cache line by line while it works
// on the rows of the panel before, which the first of them has brought there. Only for weights that
// are beyond that cache: B 20 H 1150 forward in float 81 to 65 ms, B 32 H 512 29 to 26.
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

 private:
  const char *at_, *end_;
};

// A pass's barriers, in its workspace.
struct Barriers {
  Barrier* first = nullptr;
  int64_t count = 0;

  void take(Arena& arena, int64_t wanted) {
    count = wanted;
    first = arena.take<Barrier>(count);
  }
  void clear() { memset(first, 0, sizeof(Barrier) * size_t(count)); }
  Barrier& operator[](int64_t index) const { return first[index]; }
  bool stalled() const {
    for (int64_t index = 0; index < count; ++index)
      if (first[index].stalled) return true;
    return false;
  }
};

enum Outcome {
  kRefused,  // nothing has run: OpenMP granted fewer threads than asked for
  kStalled,  // a thread was waited for at the end for longer than kStallNs
  kDone
};

// body(thread) on every thread of the team, or on none: the barriers need them all. They meet at
// the end, for OpenMP's own barrier spins for milliseconds and would keep a thread's processor from
// the one that it waits for.
template <class Body>
static Outcome run_team(int threads, const Body& body) {
  if (threads == 1) {
    body(0);
    return kDone;
  }
  Barrier end{};
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
  if (!complete) return kRefused;
#else
  return kRefused;
#endif
  return end.stalled ? kStalled : kDone;
}

// Columns of a plain product (not gates) cut into blocks of up to four vectors.
struct ColumnBlocks {
  int64_t columns = 0;
  int lanes = 1, vectors = 1;

  ColumnBlocks() = default;
  // As wide as leaves the busiest of `parts` threads the least to do.
  ColumnBlocks(int64_t columns, int lanes, int parts) : columns(columns), lanes(lanes) {
    const int64_t all = round_up(columns, lanes) / lanes;
    int64_t best = INT64_MAX;
    for (int v = kMaxVectors; v >= 1; --v) {
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
