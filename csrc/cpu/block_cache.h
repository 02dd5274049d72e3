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

  // A block of its own, of whole pages, aligned to one, or to a huge page and in such where it
  // spans several. Throws std::bad_alloc.
  static Block map(size_t bytes);
  static void unmap(const Block& block);

  // At least `bytes`, mapped or kept from before.
  Block take(size_t bytes);
  // Keeps the block for a later call. What is kept beyond FUSED_LSTM_CACHE_MB (512), or makes, with
  // what is in use, over a quarter more than ever was in use at once, is freed, oldest first: many
  // lengths take little more memory than the longest. The quarter is for calls whose blocks differ
  // in size: without it a training step that still holds its last output lost a block each time
  // (807 page faults, half of its time).
  void give(Block block);

 private:
  BlockCache();
  std::list<Block> trim();  // takes out what is not to be kept; the lock is held

  std::mutex mutex_;
  std::list<Block> free_;  // oldest first
  size_t kept_ = 0, in_use_ = 0, most_in_use_ = 0, limit_;
};

}  // namespace fused_lstm::cpu
