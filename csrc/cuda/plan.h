// Which path serves a call, and how the persistent path cuts it up. Pure C++.
//
// The persistent kernels keep the recurrent weights of some hidden units in each block, in
// registers as far as they go, in shared memory beyond, and in L2 what that does not hold. The
// blocks of one team, `slices` of them, hold all the weights of one direction and serve `tiles`
// tiles of the batch, one after the other in each step; `groups` teams share the batch. All blocks
// of a launch run at once.
#pragma once

#include <cstdint>
#include <string>

#include "launch.h"

namespace fused_lstm::cuda {

// How the recurrent product is taken, and so which kernel: tensor cores on 16 bits or tf32, or
// plain fp32 multiplications.
enum Operands { kBf16, kF16, kTf32, kF32 };

enum Pass { kForward, kBackward };

inline int element_bytes(Operands operands) { return operands <= kF16 ? 2 : 4; }

// H rounded up to the units that are published in one 32-bit word: the width of a gate in dgates.
// Where it is more than H, the column between is zero.
inline int padded_units(Operands operands, int H) { return operands <= kF16 ? (H + 1) / 2 * 2 : H; }

constexpr int kChunkBytes = 64;  // of a row of weights: what a warp multiplies at a time

// Of the recurrent weights' rows that are multiplied; and the chunks that these make.
inline int weight_columns(Pass pass, Operands operands, int H) {
  return pass == kForward ? H : 4 * padded_units(operands, H);
}
inline int weight_chunks(Operands operands, int columns) {
  return (columns * element_bytes(operands) + kChunkBytes - 1) / kChunkBytes;
}

// Chunks of weights that a warp keeps in registers: as many as leave room for the rest of what a
// thread needs among its 255 registers: what is in flight of the states too, which backward is a
// team's whole share up to H 1024 in 16 bits (published.cuh). nvcc's report decides: nothing may
// spill.
constexpr int register_chunks(Pass pass, Operands operands, int units, int tile_rows) {
  if (operands == kF32) return pass == kBackward ? 8 : units == 8 ? 4 : 2;
  if (pass == kBackward) return units == 32 ? 4 : 12;
  return tile_rows == 32 ? 2 : 4;
}
template <Pass kPass, Operands kOperands, int kUnits, int kTileRows>
constexpr int kRegisterChunks = register_chunks(kPass, kOperands, kUnits, kTileRows);

// Hidden units of a block of a team: 16, four tiles of 16 gates forward, one of 16 units backward.
// Plain fp32 multiplications take longer than all else in a step, so forward fewer where a team's
// blocks then are more: 12 or 8, three or two tiles. Backward a block asks L2 for the dgates of all
// units in its rows, so where rows are many it has 32 units, and half of the rows.
constexpr int kUsualUnits = 16;
constexpr int row_tiles(Pass pass, int units) { return pass == kBackward ? units / 16 : units / 4; }
template <Pass kPass, int kUnits>
constexpr int kRowTiles = row_tiles(kPass, kUnits);

// Rows of the batch in a tile, at least and at most: where a team's tiles of 8 would be several in
// each step, one of 16 or 32 has one chain of waits where they have several.
constexpr int least_tile_rows(int units) { return units == 32 ? 16 : 8; }
constexpr int most_tile_rows(Pass pass, Operands operands) {
  return operands == kF32 ? 8 : pass == kForward ? 32 : 16;
}

constexpr int kStagedChunks = 4;  // of states in shared memory at a time (plain_product.cuh)
constexpr int kWarpsInTeam = 8;   // of a block of a team, which share its columns
// Reckoned, not measured yet: the persistent path packs its weights first.
constexpr int kFewestSteps = 3;
// A tile of 16 rows takes 2.3 us at H 768 in fp16 (B 64 on an H100), eight 18. By cuBLAS a step took
// 46 to 81 us wherever it was measured, nearly all of it launching; in a CUDA graph, reckoned, 9.
constexpr int kMostTiles = 8;
constexpr int kMostStreamed = 256 << 10;  // bytes of weights a block and step: 4 us on an H200

// Where a block of a team has twice as many threads as cells, the half without cells serves the
// other: it loads what cells take and stores what they give away. What they hand each other through
// shared memory, bytes a cell: forward the sums' beginnings and the cell, backward its slopes; two
// copies, which a tile and the next one take in turn.
constexpr bool is_served(int tile_rows) { return tile_rows == 8; }
template <int kTileRows>
constexpr bool kIsServed = is_served(kTileRows);
constexpr int handed_bytes(Pass pass) { return 2 * (pass == kForward ? 48 : 32); }

struct Plan {
  bool persistent;
  std::string reason;  // why not

  Pass pass;
  Operands operands;
  int directions;  // of one launch; a call's others follow in launches of their own
  int units;       // of a block
  int slices, groups, tile_rows, tiles;
  int chunks;          // of 64 bytes of weight columns, for each warp
  int shared_chunks;   // of these, in shared memory
  int streamed_bytes;  // of weights that a block reads from L2 in each step
  int threads() const { return 32 * kWarpsInTeam; }
  int blocks() const { return directions * groups * slices; }

  // Shared memory: offsets and the whole, in bytes.
  int partials, bias, cell, handed, states, shared_bytes;
};

// A call of one step and so few rows is one launch (single.cu), where its weights are not so large
// that reading them takes longer than the five to seven launches of the step path. Reckoned, not
// measured.
constexpr int kMostSingleRows = 8;
constexpr int64_t kMostSingleBytes = 32 << 20;  // of a direction's weights: some 15 us on an H100
inline bool is_single(int64_t T, int64_t B, int64_t weight_bytes) {
  return T == 1 && B <= kMostSingleRows && weight_bytes <= kMostSingleBytes;
}

Plan plan(const Device& device, Pass pass, Operands operands, int T, int B, int H, int directions);

// Tiles of 16 rows of weights that a warp multiplies.
inline int row_tiles(const Plan& p) { return row_tiles(p.pass, p.units); }

// The same in words, for backends() and the benchmarks.
std::string describe(const Plan& plan);

}  // namespace fused_lstm::cuda
