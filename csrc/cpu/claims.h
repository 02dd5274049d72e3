// Which blocks of a step a thread does, where the threads of a group share them: its own share, and
// then of the others' what they have not begun. A step lasts as long as its slowest thread, and
// processors are not equally fast: beside other virtual machines, or with cores of two kinds. What
// a block comes to does not depend on who does it.
#pragma once

#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Of one thread's share: how many blocks are begun, in even and in odd steps. The owner zeroes the
// one while all are at the other.
struct alignas(64) Claim {
  int begun[2];
};

// A thread's place among those that share the blocks of each step.
struct Sharing {
  int64_t blocks;
  int me, threads;
  Claim* claims;  // one for each thread; null: each does its own share and no more

  Range own() const { return share(blocks, me, threads); }
  Sharing alone() const { return {blocks, 0, 1, nullptr}; }
};

// Meets the others that share a step. Where one goes on alone, it is false for all but this one, to
// which it gives everything: all blocks, and 0 to `all_others`.
FUSED_LSTM_INLINE bool meet(Barrier& barrier, int& threads, Sharing& sharing, Range& others,
                            int64_t all_others) {
  const int before = threads;
  threads = barrier.wait(before);
  if (threads < before) {
    sharing = sharing.alone();
    others = {0, all_others};
  }
  return threads > 0;
}

// Of all threads of a pass, in its workspace; none where nobody helps.
struct Claims {
  Claim* first = nullptr;
  int64_t count = 0;

  void take(Arena& arena, int64_t threads) {
    count = threads;
    first = count ? arena.take<Claim>(count) : nullptr;
  }
  void clear() const {
    if (first) memset(first, 0, size_t(count) * sizeof(Claim));
  }
  Sharing sharing(const Team& team, int direction, const Place& place, int64_t blocks) const {
    const int64_t group = direction * team.row_groups + place.row_group;
    return {blocks, place.unit_group, team.unit_groups,
            first ? first + group * team.unit_groups : nullptr};
  }
};

// The blocks that a thread does in a step: next() until it is false.
class StepBlocks {
 public:
  StepBlocks(const Sharing& sharing, int64_t step, bool back)
      : sharing_(sharing),
        odd_(step % 2),
        back_(back),
        owner_(sharing.me),
        order_(sharing.own(), back) {
    if (sharing.claims)
      __atomic_store_n(&sharing.claims[sharing.me].begun[1 - odd_], 0, __ATOMIC_RELAXED);
  }

  bool next() {
    if (!sharing_.claims) return ++at_ < order_.count();
    for (;;) {
      at_ = __atomic_fetch_add(&sharing_.claims[owner_].begun[odd_], 1, __ATOMIC_RELAXED);
      if (at_ < order_.count()) return true;
      owner_ = (owner_ + 1) % sharing_.threads;
      if (owner_ == sharing_.me) return false;
      order_ = Order(share(sharing_.blocks, owner_, sharing_.threads), back_);
    }
  }

  int64_t block() const { return order_[at_]; }
  // The one that most likely comes next; the same where this is the last.
  int64_t following() const { return order_.following(at_); }

 private:
  const Sharing sharing_;
  const int odd_;
  const bool back_;
  int owner_;
  Order order_;
  int64_t at_ = -1;
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
