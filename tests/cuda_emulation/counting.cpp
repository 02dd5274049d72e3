#include "counting.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator.h"

namespace fused_lstm::cuda::emulation {

bool counting = false;
Tally tally;

namespace {

struct Clock {
  int64_t trips = 0, cold = 0;

  void advance(const Clock& to) {
    trips = std::max(trips, to.trips);
    cold = std::max(cold, to.cold);
  }
  Clock after(bool is_cold) const { return {trips + 1, cold + is_cold}; }
};

struct Instruction {
  Access access;
  Site site;
  size_t bytes;
  uint32_t lanes = 0;
  uintptr_t at[kLanesOfWarp];
};

struct CountedWarp {
  Clock now, loaded;  // when all that was asked for is there
  int64_t mma = 0;
  bool stores_loaded = false;             // what it loaded, before the next collective function
  std::vector<Instruction> instructions;  // since the latest collective function
};

Tally current_tally;
std::vector<CountedWarp> counted;
int warps_of_block;
size_t shared_size;
std::unordered_map<uintptr_t, Clock> published_at;
std::unordered_set<uintptr_t> warm;  // sectors

constexpr uintptr_t kSector = 32;
constexpr int kBanks = 32;

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name() &&
         a.function_name() == b.function_name();
}

// Adds this lane to the first instruction from here that it is not yet part of.
void add_lane(CountedWarp& warp, Access access, const void* at, size_t bytes, const Site& site) {
  const int lane = running.thread % kLanesOfWarp;
  for (Instruction& one : warp.instructions) {
    if (one.lanes >> lane & 1 || one.bytes != bytes || !same_place(one.site, site)) continue;
    one.lanes |= 1u << lane;
    one.at[lane] = reinterpret_cast<uintptr_t>(at);
    return;
  }
  Instruction& one = warp.instructions.emplace_back(Instruction{access, site, bytes, 0, {}});
  one.lanes = 1u << lane;
  one.at[lane] = reinterpret_cast<uintptr_t>(at);
}

void count_shared(const Instruction& one) {
  const int at_once = one.bytes == 16 ? 8 : one.bytes == 8 ? 16 : 32;
  for (int first = 0; first < kLanesOfWarp; first += at_once) {
    std::unordered_set<uintptr_t> words;
    for (int lane = first; lane < first + at_once; ++lane)
      if (one.lanes >> lane & 1)
        for (size_t byte = 0; byte < one.bytes; byte += 4) words.insert((one.at[lane] + byte) / 4);
    if (words.empty()) continue;
    int of_bank[kBanks] = {}, most = 0;
    for (const uintptr_t word : words) most = std::max(most, ++of_bank[word % kBanks]);
    current_tally.wavefronts += most;
    current_tally.least_wavefronts += int64_t(words.size() + kBanks - 1) / kBanks;
  }
}

void count_global(const Instruction& one) {
  std::unordered_set<uintptr_t> sectors;
  for (int lane = 0; lane < kLanesOfWarp; ++lane)
    if (one.lanes >> lane & 1) sectors.insert(one.at[lane] / kSector);
  const int64_t count = int64_t(sectors.size());
  switch (one.access) {
    case kPoll:
      current_tally.polled += count;
      [[fallthrough]];
    case kLoad:
      current_tally.sectors_read += count;
      break;
    case kPrefetch:
      current_tally.sectors_prefetched += count;
      break;
    default:
      current_tally.sectors_written += count;
  }
}

bool in_shared_memory(uintptr_t at) {
  const auto begin = reinterpret_cast<uintptr_t>(running.shared);
  return at >= begin && at < begin + shared_size;
}

void end_instructions(CountedWarp& warp) {
  const auto shared = reinterpret_cast<uintptr_t>(running.shared);
  for (const Instruction& one : warp.instructions) {
    const uintptr_t at = one.at[__builtin_ctz(one.lanes)];
    if (at >= shared && at < shared + shared_size)
      count_shared(one);
    else
      count_global(one);
  }
  warp.instructions.clear();
}

void load(CountedWarp& warp, Access access, uintptr_t at, size_t bytes) {
  const bool cold = warm.insert(at / kSector).second;
  Clock there = warp.now.after(cold);
  if (access == kPoll)
    for (size_t byte = 0; byte < bytes; byte += 4)
      if (const auto found = published_at.find(at + byte); found != published_at.end())
        there.advance(found->second.after(cold));
  warp.loaded.advance(there);
}

}  // namespace

void note(Access access, const void* at, size_t bytes, const Site& site) {
  CountedWarp& warp =
      counted[size_t(running.block * warps_of_block + running.thread / kLanesOfWarp)];
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (running.block == 0) add_lane(warp, access, at, bytes, site);
  if (in_shared_memory(address)) {
    if (access == kStore && bytes == 16) warp.stores_loaded = true;
  } else if (access == kLoad || access == kPoll) {
    load(warp, access, address, bytes);
  } else if (access == kPublish) {
    published_at[address] = warp.now;
  } else {
    warm.insert(address / kSector);
  }
}

void start_count(int blocks, int threads, int shared_bytes) {
  current_tally = {};
  warps_of_block = threads / kLanesOfWarp;
  shared_size = size_t(shared_bytes + 127) / 128 * 128;
  counted.assign(size_t(blocks * warps_of_block), {});
  published_at.clear();
  warm.clear();
}

void end_count() {
  if (current_tally.barriers == 0) return;
  for (const CountedWarp& warp : counted) {
    current_tally.mma = std::max(current_tally.mma, warp.mma);
    current_tally.trips = std::max(current_tally.trips, warp.now.trips);
    current_tally.cold_trips = std::max(current_tally.cold_trips, warp.now.cold);
  }
  tally = current_tally;
}

void count_collective(Collective what) {
  CountedWarp& warp =
      counted[size_t(running.block * warps_of_block + running.thread / kLanesOfWarp)];
  if (what != kWarpBarrier || warp.stores_loaded) warp.now.advance(warp.loaded);
  warp.stores_loaded = false;
  warp.mma += what == kMmaBf16 || what == kMmaF16 || what == kMmaTf32;
  if (running.block == 0) end_instructions(warp);
}

void count_barrier() {
  const auto first = counted.begin() + running.block * warps_of_block;
  Clock latest;
  for (auto warp = first; warp != first + warps_of_block; ++warp) {
    if (running.block == 0) end_instructions(*warp);
    if (warp->stores_loaded) warp->now.advance(warp->loaded);
    warp->stores_loaded = false;
    latest.advance(warp->now);
  }
  for (auto warp = first; warp != first + warps_of_block; ++warp) warp->now = latest;
  current_tally.barriers += running.block == 0;
}

}  // namespace fused_lstm::cuda::emulation
