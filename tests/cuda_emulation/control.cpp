// What tests tell the emulator and ask of it, in C for ctypes.
#include <cstring>

#include "counting.h"
#include "emulator.h"

using namespace fused_lstm::cuda::emulation;

extern "C" {

// Launches from here on are scheduled by this policy and seed: the same ones in the same way.
void emulation_schedule(uint64_t seed, int policy) {
  settings.seed = seed;
  settings.policy = Policy(policy % kPolicies);
  counts = {};
}

void emulation_device(int multiprocessors, int shared_bytes, int major, int minor,
                      int cooperative) {
  settings.device = {multiprocessors, shared_bytes, major, minor, cooperative != 0};
}

// The barrier at this line of this file does nothing; file "": all do what they should.
void emulation_drop(const char* file, int line) {
  settings.dropped_file = file;
  settings.dropped_line = uint32_t(line);
}

// A line for each barrier that was reached since the process began, "block FILE LINE" or "warp FILE
// LINE"; some may come twice. Good until the next call.
const char* emulation_barriers() {
  static std::string all;
  all.clear();
  for (const Barrier& b : barriers)
    all += std::string(b.of_block ? "block " : "warp ") + file_of(b.site) + " " +
           std::to_string(b.site.line()) + "\n";
  return all.c_str();
}

// Since the schedule was set: launches, those of them whose blocks ran together, threads, turns of
// threads, barriers that a whole block has passed, published words, calls of load_published,
// fills.
void emulation_counts(int64_t (&values)[8]) {
  static_assert(sizeof values == sizeof counts);
  std::memcpy(values, &counts, sizeof values);
}

// From here on, what a launch asks of the hardware is counted (counting.h), or no longer.
void emulation_count(int on) { counting = on != 0; }

// Of the latest launch that was counted and had block barriers, in Tally's order.
void emulation_tally(int64_t (&values)[10]) {
  static_assert(sizeof values == sizeof tally);
  std::memcpy(values, &tally, sizeof values);
}

void emulation_clock(int milliseconds_a_look) {
  settings.milliseconds_a_look = uint32_t(milliseconds_a_look);
}

}  // extern "C"

namespace fused_lstm::cuda {

const char* fill(void* at, int value, size_t bytes, Stream) {
  ++counts.fills;
  std::memset(at, value, bytes);
  return nullptr;
}

const char* properties(Device& device) {
  device = settings.device;
  return nullptr;
}

uint32_t milliseconds() {
  static uint32_t now = 0xffffff00u;  // about to begin anew
  return now += settings.milliseconds_a_look;
}

}  // namespace fused_lstm::cuda
