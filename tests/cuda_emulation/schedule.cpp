// Launches: the threads as fibres, which of them goes on, and what can't go on.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "counting.h"
#include "emulator.h"
#include "faults.h"
#include "fibre.h"
#include "ready.h"

namespace fused_lstm::cuda::emulation {

Running running;
Settings settings;
Counts counts;
std::vector<Barrier> barriers;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kMostThreadsAtOnce = 4096;   // of launches that are not `together`
constexpr int kMostFruitlessRounds = 32;   // of all threads polling, and nothing else happening
constexpr int kMostFruitlessPolls = 4096;  // before nobody polls again but when all do
constexpr uint32_t kPoison = 0x7fc17fc1;   // a NaN as float, bfloat16 and half

enum State { kReady, kPolling, kAtCollective, kAtBarrier, kGone };

struct Fibre {
  Context context;
  Running place;
  int warp, rank;
  State state;
  Site site;
  void* argument;       // of the collective function it waits at
  const void* read_at;  // where it last called load_published, and what it found
  Words read;
};

struct Warp {
  int first, arrived, gone;
  Collective what;
  Site site;  // where the first of those that have arrived waits
};

struct Block {
  int first, arrived, gone;
  Site site;
};

// Notes the barrier, and says whether it is the one that does nothing.
bool is_dropped(const Site& site, bool of_block) {
  const auto known = [&](const Barrier& b) {
    return b.site.line() == site.line() && b.site.file_name() == site.file_name();
  };
  if (std::none_of(barriers.begin(), barriers.end(), known)) barriers.push_back({site, of_block});
  return site.line() == settings.dropped_line && settings.dropped_file == file_of(site);
}

void (*thread_body)(const void*);
const void* call_of_launch;
Grid grid;

std::vector<Fibre> fibres;
std::vector<Warp> warps;
std::vector<Block> blocks;
std::vector<int> by_rank, polling;
Ready ready;
Publications publications;
Pieces stacks, shared_memories;
Random dice;
Context scheduler;
Fibre* current;
int alive, latest_rank;
int fruitless_rounds, fruitless_polls;  // since something came that threads may wait for
std::string error;                      // of the latest launch

std::string name(const Site& site) {
  return std::string(file_of(site)) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

void leave() {
  current->place.turn = running.turn;
  switch_context(current->context, scheduler);
}

void progress() { fruitless_rounds = fruitless_polls = 0; }

void make_ready(Fibre& fibre) {
  fibre.state = kReady;
  ready.add(fibre.rank);
}

void wait(State state) {
  current->state = state;
  leave();
}

void stop(const std::string& what) {
  if (error.empty()) error = what;
  if (in_fibre) leave();  // for good
}

std::string who(const Fibre& fibre) {
  return "block " + std::to_string(fibre.place.block) + " thread " +
         std::to_string(fibre.place.thread);
}

[[noreturn]] void start() {
  thread_body(call_of_launch);
  Warp& warp = warps[size_t(current->warp)];
  Block& block = blocks[size_t(current->warp) * kLanesOfWarp / size_t(grid.threads)];
  if (warp.arrived)
    stop("divergence: " + who(*current) + " has ended and other lanes of its warp wait for it");
  if (block.arrived)
    stop("divergence: " + who(*current) + " has ended and its block waits for it at a barrier");
  ++warp.gone, ++block.gone;
  --alive;
  progress();
  wait(kGone);
  std::abort();
}

template <class Iterator>
void shuffle(Iterator first, size_t count) {
  for (size_t i = count; i > 1; --i) std::swap(first[i - 1], first[dice.below(i)]);
}

// The warps, or blocks, one after the other: neighbours share caches.
void rank() {
  const int count = int(fibres.size());
  const int unit = settings.policy == kBlockAhead ? grid.threads : kLanesOfWarp;
  by_rank.resize(size_t(count));
  std::vector<int> order(size_t(count / unit));
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  if (settings.policy <= kBlockAhead) shuffle(order.begin(), order.size());
  for (int r = 0; r < count; ++r)
    by_rank[size_t(r)] =
        settings.policy == kLastFirst ? count - 1 - r : order[size_t(r / unit)] * unit + r % unit;
  ready.clear(count);
  for (int r = 0; r < count; ++r) {
    if (settings.policy == kRandom && r % kLanesOfWarp == 0)
      shuffle(by_rank.begin() + r, kLanesOfWarp);
    Fibre& fibre = fibres[size_t(by_rank[size_t(r)])];
    fibre.rank = r;
    if (fibre.state == kReady) ready.add(r);
  }
}

void poll_again(size_t index) {
  make_ready(fibres[size_t(polling[index])]);
  polling[index] = polling.back();
  polling.pop_back();
}

void some_publications_arrive() {
  for (uint32_t n = 1 + dice.below(publications.size()); n; --n)
    publications.arrive(dice.below(publications.size()));
  progress();
}

std::string deadlock() {
  std::map<std::string, int> waits;
  for (const Fibre& f : fibres)
    if (f.state != kGone)
      ++waits["block " + std::to_string(f.place.block) + " " +
              (f.state == kPolling ? "for a published word" : "at " + name(f.site))];
  std::string text = "deadlock: threads wait in ";
  int lines = 0;
  for (const auto& [where, count] : waits) {
    if (++lines > 6) break;
    text += (lines > 1 ? ", " : "") + where + " (" + std::to_string(count) + ")";
  }
  return text + (lines > 6 ? ", ..." : "");
}

// The next fibre to run, or null: a deadlock.
Fibre* choose() {
  if (settings.policy == kRandom) {
    if (!publications.empty() && dice.one_in(64)) {
      publications.arrive(dice.below(publications.size()));
      progress();
    }
    if (!polling.empty() && fruitless_polls < kMostFruitlessPolls && dice.one_in(16))
      poll_again(dice.below(polling.size()));
  } else if (settings.policy <= kBlockAhead && dice.one_in(4096)) {
    rank();
  }
  if (ready.empty()) {
    if (polling.empty() || fruitless_rounds++ == kMostFruitlessRounds) return nullptr;
    if (!publications.empty()) some_publications_arrive();
    while (!polling.empty()) poll_again(polling.size() - 1);
  }
  int from = 0;
  if (settings.policy == kRandom)  // mostly the next one, for the caches' sake
    from = int(dice.one_in(8) ? dice.below(fibres.size()) : (latest_rank + 1) % fibres.size());
  latest_rank = ready.take(from);
  return &fibres[size_t(by_rank[size_t(latest_rank)])];
}

// Runs these blocks, all at once, to their end or to an error.
void run_blocks(const std::vector<int>& which) {
  const size_t warps_of_block = size_t(grid.threads) / kLanesOfWarp;
  const size_t count = which.size() * size_t(grid.threads);
  const size_t shared_bytes = size_t(grid.shared_bytes + 127) / 128 * 128;
  stacks.reserve(count, kStackBytes);
  shared_memories.reserve(which.size(), shared_bytes);
  fibres.assign(count, Fibre{});
  warps.assign(which.size() * warps_of_block, Warp{});
  blocks.assign(which.size(), Block{});
  polling.clear();
  publications.clear();
  for (size_t b = 0; b < which.size(); ++b) {
    char* shared = shared_memories.end(b) - shared_bytes;
    for (size_t i = 0; i < shared_bytes; i += 4) std::memcpy(shared + i, &kPoison, 4);
    for (int thread = 0; thread < grid.threads; ++thread) {
      const size_t f = b * size_t(grid.threads) + size_t(thread);
      fibres[f].place = {thread, grid.threads, which[b], grid.blocks, shared, 0};
      fibres[f].warp = int(f) / kLanesOfWarp;
      // Stacks that began at the same place of their pages would share a few sets of the cache.
      make_context(fibres[f].context, stacks.begin(f), kStackBytes - f % 31 * 128, start);
    }
    blocks[b].first = int(b) * grid.threads;
  }
  for (size_t w = 0; w < warps.size(); ++w) warps[w].first = int(w) * kLanesOfWarp;
  rank();
  alive = int(count);
  latest_rank = 0;
  progress();
  counts.threads += alive;
  if (sigsetjmp(after_fault, 1)) {
    char text[40];
    std::snprintf(text, sizeof text, ": memory fault at %p", faulted);
    return stop(who(*current) + text);
  }
  while (alive && error.empty()) {
    current = choose();
    if (!current) return stop(deadlock());
    ++counts.switches;
    running = current->place;
    running.turn = settings.policy == kRandom ? dice.below(64) : INT64_MAX;
    in_fibre = true;
    switch_context(scheduler, current->context);
    in_fibre = false;
  }
  while (!publications.empty()) publications.arrive(publications.size() - 1);
}

}  // namespace

void fail(const char* what) { stop(who(*current) + ": " + what); }

void take_turns() {
  make_ready(*current);
  leave();
}

void together(Collective what, void* argument, Site site) {
  maybe_take_turns();
  Warp& warp = warps[size_t(current->warp)];
  if (warp.gone)
    stop("divergence: " + who(*current) + " waits at " + name(site) + ", lanes of its warp ended");
  current->site = site;
  current->argument = argument;
  if (warp.arrived && (what != warp.what || !same(site, warp.site)))
    stop("divergence: " + who(*current) + " is at " + name(site) + ", other lanes of its warp at " +
         name(warp.site));
  warp.what = what;
  warp.site = site;
  if (++warp.arrived < kLanesOfWarp) return wait(kAtCollective);
  void* arguments[kLanesOfWarp];
  for (int i = 0; i < kLanesOfWarp; ++i) arguments[i] = fibres[size_t(warp.first + i)].argument;
  perform(what, arguments);
  if (counting) count_collective(what);
  warp.arrived = 0;
  for (int i = 0; i < kLanesOfWarp; ++i)
    if (Fibre& other = fibres[size_t(warp.first + i)]; &other != current) make_ready(other);
}

const char* run(const Grid& shape, void (*thread)(const void*), const void* call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Device& device = settings.device;
  error.clear();
  if (shape.blocks <= 0 || shape.threads <= 0 || shape.threads > 1024 ||
      shape.threads % kLanesOfWarp || shape.shared_bytes > device.shared_bytes)
    error = "invalid launch: " + std::to_string(shape.blocks) + " blocks of " +
            std::to_string(shape.threads) + " threads, " + std::to_string(shape.shared_bytes) +
            " bytes of shared memory";
  else if (shape.together && !device.cooperative)
    error = "the device has no cooperative launches";
  else if (shape.together && shape.blocks > device.multiprocessors * resident(shape))
    error = "too many blocks for a cooperative launch: " + std::to_string(shape.blocks) + " on " +
            std::to_string(device.multiprocessors) + " multiprocessors";
  if (!error.empty()) return error.c_str();

  dice.seed(settings.seed * 1000003 + uint64_t(counts.launches++));
  counts.together += shape.together;
  grid = shape;
  thread_body = thread;
  call_of_launch = call;
  std::vector<int> order(size_t(grid.blocks));
  for (size_t i = 0; i < order.size(); ++i)
    order[i] = settings.policy == kLastFirst ? grid.blocks - 1 - int(i) : int(i);
  if (settings.policy <= kBlockAhead) shuffle(order.begin(), order.size());
  const size_t at_once =
      grid.together ? order.size() : size_t(std::max(1, kMostThreadsAtOnce / grid.threads));
  if (counting) start_count(grid.blocks, grid.threads, grid.shared_bytes);
  const Faults faults;
  for (size_t first = 0; first < order.size() && error.empty(); first += at_once) {
    const size_t end = std::min(order.size(), first + at_once);
    run_blocks({order.begin() + int64_t(first), order.begin() + int64_t(end)});
  }
  if (counting) end_count();
  return error.empty() ? nullptr : error.c_str();
}

int resident(const Grid& shape) {
  return shape.threads <= 1024 && shape.shared_bytes <= settings.device.shared_bytes ? 1 : 0;
}

}  // namespace fused_lstm::cuda::emulation

namespace fused_lstm::cuda {

using namespace emulation;

void block_barrier(Site site) {
  maybe_take_turns();
  if (is_dropped(site, true)) return;
  Block& block = blocks[size_t(current->warp) * kLanesOfWarp / size_t(grid.threads)];
  if (block.gone)
    stop("divergence: " + who(*current) + " waits at " + name(site) +
         ", threads of its block ended");
  current->site = site;
  if (block.arrived && !same(site, block.site))
    stop("divergence: " + who(*current) + " is at " + name(site) + ", others of its block at " +
         name(block.site));
  block.site = site;
  if (++block.arrived < grid.threads) return wait(kAtBarrier);
  block.arrived = 0;
  ++counts.barriers;
  if (counting) count_barrier();
  progress();
  for (int i = 0; i < grid.threads; ++i)
    if (Fibre& other = fibres[size_t(block.first + i)]; &other != current) make_ready(other);
}

void warp_barrier(Site site) {
  if (is_dropped(site, false)) return maybe_take_turns();
  together(kWarpBarrier, nullptr, site);
}

Words load_published(const void* at, Site site) {
  maybe_take_turns();
  require_aligned(at, 16);
  Words words;
  for (;;) {
    std::memcpy(&words, at, 16);
    publications.overlay(at, words, int(current - fibres.data()));
    bool missing = at == current->read_at && !std::memcmp(&words, &current->read, 16);
    for (const uint32_t word : words.word) missing |= word == kNotYetPublished;
    current->read_at = at;
    current->read = words;
    ++counts.polls;
    if (!missing) break;
    ++fruitless_polls;  // what it will find out is that it has to ask again: let others go on
    polling.push_back(int(current - fibres.data()));
    wait(kPolling);
    if (!counting) break;  // else every trip that is counted finds what it was made for
  }
  if (counting) note(kPoll, at, 16, site);
  return words;
}

void publish(void* at, uint32_t word, Site site) {
  maybe_take_turns();
  require_aligned(at, 4);
  ++counts.publications;
  if (counting) note(kPublish, at, 4, site);
  const int fibre = int(current - fibres.data());
  if (const char* wrong = publications.add(static_cast<uint32_t*>(at), word, fibre)) fail(wrong);
}

void give_up() {
  stop(who(*current) + " gave up");
  std::abort();
}

}  // namespace fused_lstm::cuda
