// Which fibres can go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused_lstm::cuda::emulation {

// By rank: the policy ranks them.
class Ready {
 public:
  void clear(int fibres) {
    bits_.assign(size_t(fibres + 63) / 64, 0);
    count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void add(int rank) {
    bits_[size_t(rank) / 64] |= uint64_t(1) << rank % 64;
    ++count_;
  }
  // The first from rank `from` on, and around the end.
  int take(int from) {
    size_t word = size_t(from) / 64;
    uint64_t bits = bits_[word] >> from % 64 << from % 64;
    while (!bits) {
      word = word + 1 == bits_.size() ? 0 : word + 1;
      bits = bits_[word];
    }
    bits_[word] &= ~(bits & -bits);
    --count_;
    return int(word) * 64 + __builtin_ctzll(bits);
  }

 private:
  std::vector<uint64_t> bits_;
  int count_ = 0;
};

}  // namespace fused_lstm::cuda::emulation
