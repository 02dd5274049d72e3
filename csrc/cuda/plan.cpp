#include "plan.h"

#include <algorithm>

namespace fused_lstm::cuda {
namespace {

constexpr int kFragmentBytes = 1024;  // one chunk of 16 rows, in the order of the lanes

int ceil_div(int a, int b) { return (a + b - 1) / b; }

Plan refuse(Plan plan, std::string reason) {
  plan.persistent = false;
  plan.reason = std::move(reason);
  return plan;
}

// Sets the offsets for so many chunks of weights of each warp.
void lay_out_shared_memory(Plan& p, int shared_chunks) {
  const int cells = p.units * p.tile_rows;
  // One barrier a tile does, by writing to two copies in turn.
  constexpr int kCopies = 2;
  p.shared_chunks = shared_chunks;
  p.partials = shared_chunks * row_tiles(p) * kWarpsInTeam * kFragmentBytes;
  p.bias = p.partials + kCopies * kWarpsInTeam * cells * (p.pass == kForward ? 16 : 4);
  p.cell = p.bias + (p.pass == kForward ? p.units * 16 : 0);
  p.handed = p.cell + p.tiles * cells * 4;
  p.states = p.handed + (is_served(p.tile_rows) ? cells * handed_bytes(p.pass) : 0);
  // Plain fp32 multiplications read states from shared memory, where each warp puts its share.
  const int staged =
      p.operands == kF32 ? kWarpsInTeam * kStagedChunks * p.tile_rows * kChunkBytes : 0;
  p.shared_bytes = p.states + staged;
}

// As many of the chunks that registers don't hold as go into shared memory.
void share_out_weights(Plan& p, const Device& device) {
  const int chunk = row_tiles(p) * kWarpsInTeam * kFragmentBytes;
  const int rest =
      std::max(0, p.chunks - register_chunks(p.pass, p.operands, p.units, p.tile_rows));
  lay_out_shared_memory(p, 0);
  const int room = std::max(0, device.shared_bytes - p.shared_bytes) / chunk;
  lay_out_shared_memory(p, std::min(rest, room));
  p.streamed_bytes = (rest - p.shared_chunks) * chunk * p.tiles;
}

// Into blocks of so many units, teams and tiles.
Plan cut(Plan p, const Device& device, int B, int H, int columns, int units) {
  p.units = units;
  p.slices = ceil_div(H, units);
  p.chunks = ceil_div(weight_chunks(p.operands, columns), kWarpsInTeam);
  if (p.slices * p.directions > device.multiprocessors) p.directions = 1;
  const int most_groups = device.multiprocessors / (p.slices * p.directions);
  if (most_groups == 0)
    return refuse(p, "H needs " + std::to_string(p.slices) + " multiprocessors, the device has " +
                         std::to_string(device.multiprocessors));
  const auto cut_batch = [&](int tile_rows) {
    p.tile_rows = tile_rows;
    const int all_tiles = ceil_div(B, tile_rows);
    p.groups = std::min(most_groups, all_tiles);
    p.tiles = ceil_div(all_tiles, p.groups);
    share_out_weights(p, device);
  };
  int tile_rows = most_tile_rows(p.pass, p.operands);
  const int least = least_tile_rows(units);
  while (tile_rows > least && ceil_div(B, tile_rows / 2) <= most_groups) tile_rows /= 2;
  cut_batch(tile_rows);
  // The kernels for more than 8 rows have no registers left for weights from L2.
  while (p.tile_rows > least && (p.streamed_bytes > 0 || p.shared_bytes > device.shared_bytes))
    cut_batch(p.tile_rows / 2);
  if (p.tiles > kMostTiles)
    return refuse(p, "B gives each team more than " + std::to_string(kMostTiles) + " tiles a step");
  if (p.shared_bytes > device.shared_bytes)
    return refuse(p, "a block needs " + std::to_string(p.shared_bytes) +
                         " bytes of shared memory, the device has " +
                         std::to_string(device.shared_bytes));
  if (p.streamed_bytes > (p.tile_rows > 8 ? 0 : kMostStreamed))
    return refuse(p, "a block would read " + std::to_string(p.streamed_bytes) +
                         " bytes of weights anew in each step");
  p.persistent = true;
  return p;
}

// With other units to a block than usual (plan.h): with fewer where no block then has more tiles and
// a warp has more than a chunk of columns to multiply, for below that a step is all exchange, and
// more blocks wait for each other; with more where each then has fewer tiles.
Plan cut(const Plan& p, const Device& device, int B, int H, int columns) {
  if (!device.cooperative) return refuse(p, "the device has no cooperative launches");
  Plan best = cut(p, device, B, H, columns, kUsualUnits);
  const auto consider = [&](int units, int most_tiles) {
    const Plan other = cut(p, device, B, H, columns, units);
    const bool better = other.tiles <= most_tiles && other.directions == best.directions;
    if (other.persistent && (!best.persistent || better)) best = other;
  };
  if (p.operands == kF32) {
    if (p.pass == kForward && best.chunks > 1)
      for (const int units : {12, 8}) consider(units, best.tiles);
  } else if (p.pass == kBackward && (best.tiles > 1 || !best.persistent)) {
    consider(32, best.tiles - 1);
  }
  return best;
}

}  // namespace

Plan plan(const Device& device, Pass pass, Operands operands, int T, int B, int H, int directions) {
  Plan p{};
  p.pass = pass;
  p.operands = operands;
  p.directions = directions;
  if (device.major < 8) return refuse(p, "the persistent kernels need compute capability 8.0");
  if (T < kFewestSteps)
    return refuse(p, "T is below " + std::to_string(kFewestSteps) + ": not worth packing weights");
  const int columns = weight_columns(pass, operands, H);
  // Teams count 16 bytes of what they exchange in 32 bits.
  if (int64_t(T + 1) * B * ceil_div(columns * element_bytes(operands), 16) > INT32_MAX)
    return refuse(p, "T times B times H is beyond 32 bits");
  return cut(p, device, B, H, columns);
}

std::string describe(const Plan& p) {
  if (!p.persistent) return "a product and a fused cell for each step: " + p.reason;
  auto count = [](int n, const std::string& what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  return "persistent: " + count(p.directions, "direction") + " at a time, " +
         count(p.groups, "team") + " each of " + count(p.slices, "block") + " of " +
         count(p.units, "unit") + " and " + count(p.threads(), "thread") + ", " +
         count(p.tiles, "tile") + " of " + std::to_string(p.tile_rows) + " rows a step, " +
         std::to_string(p.shared_bytes) + " bytes of shared memory, " +
         std::to_string(p.streamed_bytes) + " bytes of weights read anew a step";
}

}  // namespace fused_lstm::cuda
