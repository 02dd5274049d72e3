// What the parts of the emulator have of each other. Kernels see emulation.h only.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/device.cuh"

namespace fused_lstm::cuda::emulation {

constexpr int kLanesOfWarp = 32;
constexpr uint32_t kNotYetPublished = 0xffffffffu;

// Which thread goes on, of those that can.
enum Policy {
  kRandom,      // any, and no thread for long
  kWarpAhead,   // the threads of one warp as long as they can; now and then another warp's
  kBlockAhead,  // the same with blocks
  kLastFirst,   // the last thread of the last block
  kFirstFirst,  // the first thread of the first block
  kPolicies
};

struct Settings {
  uint64_t seed = 0;
  Policy policy = kRandom;
  Device device = {4, 227 << 10, 9, 0, true};
  std::string dropped_file;  // of a barrier that does nothing, and its line
  uint32_t dropped_line = 0;
  uint32_t milliseconds_a_look = 0;  // that the clock goes on by when a kernel looks at it
};
extern Settings settings;

struct Counts {
  int64_t launches = 0, together = 0, threads = 0, switches = 0, barriers = 0, publications = 0,
          polls = 0, fills = 0;
};
extern Counts counts;

// The file's name, without folders.
inline const char* file_of(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return slash ? slash + 1 : site.file_name();
}

// The barriers that have been reached.
struct Barrier {
  Site site;
  bool of_block;
};
extern std::vector<Barrier> barriers;

class Random {  // xorshift64*
 public:
  void seed(uint64_t value) { state_ = (value * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) | 1; }
  uint32_t below(uint64_t count) {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return uint32_t((state_ * 0x2545f4914f6cdd1du >> 32) * count >> 32);
  }
  bool one_in(uint32_t count) { return below(count) == 0; }

 private:
  uint64_t state_ = 1;
};

// Words that their threads have published and that have not yet arrived in memory.
class Publications {
 public:
  // Null, or what is wrong with it.
  const char* add(uint32_t* at, uint32_t word, int fibre);
  // Puts into `words`, loaded from `at`, what the thread itself has published.
  void overlay(const void* at, Words& words, int fibre) const;
  bool empty() const { return waiting_.empty(); }
  size_t size() const { return waiting_.size(); }
  void arrive(size_t index);
  void clear();

 private:
  struct Publication {
    uint32_t* at;
    uint32_t word;
    int fibre;
  };
  std::vector<Publication> waiting_;
  std::unordered_map<const void*, size_t> index_;
};

// Does what the 32 lanes came for.
void perform(Collective what, void* const (&arguments)[kLanesOfWarp]);

}  // namespace fused_lstm::cuda::emulation
