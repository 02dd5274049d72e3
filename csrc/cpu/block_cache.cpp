#include "block_cache.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_lstm::cpu {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20, kDefaultLimit = size_t(512) << 20;

// Up to an eighth more, so that sequences of nearly the same length share blocks.
size_t size_class(size_t bytes) {
  size_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

#if defined(__linux__)

// Mapped by themselves: from the C library's heap they would leave holes.
void* allocate(size_t bytes) {
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kPage, room = bytes + alignment;
  char* mapped = static_cast<char*>(
      mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const size_t before = (alignment - reinterpret_cast<uintptr_t>(mapped) % alignment) % alignment;
  if (before) munmap(mapped, before);
  if (room > before + bytes) munmap(mapped + before + bytes, room - before - bytes);
  if (alignment == kHugePage) madvise(mapped + before, bytes, MADV_HUGEPAGE);
  return mapped + before;
}

void release(const BlockCache::Block& block) { munmap(block.data, block.bytes); }

// glibc keeps of its heap what it has learnt to from the largest block that was freed, up to 32 MB;
// it never sees those that are kept here. Without one, it would give torch's own tensors back to
// the system in each step and have them mapped again page by page: charlm's step at B 32 T 64 H
// 512 in 150 instead of 143 ms, with 2,187 page faults instead of 115. Nothing is written, so it
// costs no memory; it does nothing where the process has set its own limits.
void show_the_heap_a_large_block() {
  void* volatile block = std::malloc((size_t(32) << 20) - (size_t(64) << 10));
  std::free(block);
}

#else

void* allocate(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kPage, bytes) != 0) throw std::bad_alloc();
  return data;
}

void release(const BlockCache::Block& block) { std::free(block.data); }
void show_the_heap_a_large_block() {}

#endif

}  // namespace

BlockCache::Block BlockCache::map(size_t bytes) {
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  return {allocate(pages), pages};
}

void BlockCache::unmap(const Block& block) { release(block); }

BlockCache& BlockCache::instance() {
  static BlockCache* cache = new BlockCache();
  return *cache;
}

BlockCache::BlockCache() : limit_(kDefaultLimit) {
  show_the_heap_a_large_block();
  if (const char* megabytes = std::getenv("FUSED_LSTM_CACHE_MB"))
    limit_ = size_t(std::strtoull(megabytes, nullptr, 10)) << 20;
}

BlockCache::Block BlockCache::take(size_t bytes) {
  Block found{nullptr, size_class(bytes)};
  std::list<Block> surplus;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t most = found.bytes + found.bytes / 2;
    auto best = free_.end();  // the smallest that is at most half as large again; of those the last
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= found.bytes && block->bytes <= most &&
          (best == free_.end() || block->bytes <= best->bytes))
        best = block;
    if (best != free_.end()) {
      found = *best;
      free_.erase(best);
      kept_ -= found.bytes;
    }
    in_use_ += found.bytes;
    if (in_use_ > most_in_use_) most_in_use_ = in_use_;
    surplus = trim();
  }
  for (const Block& old : surplus) release(old);
  if (found.data) return found;
  try {
    return {allocate(found.bytes), found.bytes};
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= found.bytes;
    throw;
  }
}

void BlockCache::give(Block block) {
  std::list<Block> surplus;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += block.bytes;
    in_use_ -= block.bytes;
    surplus = trim();
  }
  for (const Block& old : surplus) release(old);
}

std::list<BlockCache::Block> BlockCache::trim() {
  std::list<Block> surplus;
  const size_t most = most_in_use_ + most_in_use_ / 4;
  while (kept_ > limit_ || kept_ + in_use_ > most) {  // in_use_ alone never is
    kept_ -= free_.front().bytes;
    surplus.splice(surplus.end(), free_, free_.begin());
  }
  return surplus;
}

}  // namespace fused_lstm::cpu
