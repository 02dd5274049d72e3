// A stream: a stack of layers whose weights are packed once and whose states stay from step to
// step. No torch: `fused_lstm._C.Stream` (csrc/module_stream.cpp) is its face.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "block_cache.h"
#include "dispatch.h"

namespace fused_lstm::cpu {

class Stream {
 public:
  // With the kernels of the instruction set in use now. layers: L. Throws std::invalid_argument
  // where they don't keep weights of this dtype in this width.
  Stream(Dtype dtype, StreamWidth width, const StreamShape& shape,
         const std::vector<StreamWeights>& layers);
  // The same weights, one copy, and a state of its own, as it stands.
  Stream(const Stream& other);
  Stream& operator=(const Stream&) = delete;

  struct Rows {  // (T, B, columns), the last dimension dense
    void* data;
    int64_t stride_t, stride_b;
  };
  // T steps, by up to `threads` threads.
  void run(int64_t T, const Rows& x, const Rows& y, int threads);
  // Whether several threads are worth having.
  bool is_shared() const { return products_ >= kSharedProducts || weight_bytes() >= kSharedBytes; }
  // Whether so many steps take long enough for others to run meanwhile.
  bool takes_long(int64_t T) const { return T * products_ > kLongProducts; }

  void pack(const std::vector<StreamWeights>& layers);
  void reset();
  void reset(const std::vector<int64_t>& rows);
  void write(const void* h, const void* c);
  void read(void* h, void* c) const;

  const StreamShape& shape() const { return call_.shape; }
  Dtype dtype() const { return dtype_; }
  int64_t weight_bytes() const { return weights_->bytes(); }
  int64_t state_bytes() const { return state_.bytes(); }

 protected:
  // Multiply-adds and bytes of weights of a step below which one thread is as fast, or nearly, and
  // waits for nobody: some 9 us. What two threads read may be in their second-level caches where
  // one's is too small: H 256 in float32 40 to 11 us.
  static constexpr int64_t kSharedProducts = 1'000'000, kSharedBytes = 1 << 20;
  // The same, below which it isn't worth letting go of Python's lock: some 20 us.
  static constexpr int64_t kLongProducts = 500'000;

  class Memory {
   public:
    explicit Memory(int64_t bytes) : block_(BlockCache::map(size_t(bytes))), bytes_(bytes) {}
    ~Memory() { BlockCache::unmap(block_); }
    Memory(const Memory&) = delete;
    void* data() const { return block_.data; }
    int64_t bytes() const { return bytes_; }

   private:
    BlockCache::Block block_;
    int64_t bytes_;
  };

  // Throws std::runtime_error where another thread is in this stream.
  class InUse {
   public:
    explicit InUse(std::atomic<bool>& flag);
    ~InUse() { flag_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool>& flag_;
  };

  // In use. current is left as it is.
  void run_call(const StreamCall& call, int threads) const;

  Dtype dtype_;
  const StreamKernel& kernel_;
  StreamCall call_;  // but for the steps, x and y
  std::shared_ptr<const Memory> weights_;
  Memory state_;
  int64_t products_;  // multiply-adds of a step
  mutable std::atomic<bool> in_use_{false};
};

}  // namespace fused_lstm::cpu
