// Large buffers that are reused from call to call. The C library gives blocks of this size back to
// the system when they are freed and maps them anew, zeroed page by page, at the next call: 128 of
// 365 ms (both cores' time beside wall time) of a forward and backward at B 128 T 100 H 512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>

namespace fused_lstm::cpu {

class BlockCache {
 public:
  // One for the process; never destroyed, since tensors may outlive every static object.
  static BlockCache& instance();

  struct Block {
    void* data;
    size_t bytes;
  };

  // At least `bytes`, aligned to a page, or to a huge page where it spans several. Throws
  // std::bad_alloc.
  Block take(size_t bytes);
  // Keeps the block for a later call. What exceeds FUSED_LSTM_CACHE_MB (512) is freed, oldest
  // first.
  void give(Block block);

 private:
  BlockCache();

  std::mutex mutex_;
  std::list<Block> free_;  // oldest first
  size_t kept_ = 0, limit_;
};

}  // namespace fused_lstm::cpu
