// What the persistent kernels have in common: their parameters, the walk over steps and tiles, and
// how a block is placed among the others.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_lstm::cuda {

// The numbers of a Plan that kernels need, with what follows from them for this call.
struct Tiling {
  int slices, units, groups, tiles;
  int row_tiles, chunks;  // of a warp
  int shared_chunks;      // of these, in shared memory
  int columns;     // of the recurrent weights' rows that are multiplied: H, or 4 padded H backward
  int all_chunks;  // of 64 bytes, that these columns make
  int padded;      // H rounded up to the units of one published word
  int partials, bias, cell, handed, states;
};

struct ForwardTask {
  ForwardDirection given;
  const Words* weights;  // packed (prepare.cu)
  char* states;          // (B + N, states_stride) h_0, then h_t: how blocks of a team exchange h
};

struct ForwardParams {
  Extent extent;
  Tiling tiling;
  int states_stride;  // bytes
  bool save;
  ForwardTask direction[2];
};

struct BackwardTask {
  BackwardDirection given;
  const Words* weights;  // packed (prepare.cu)
};

struct BackwardParams {
  Extent extent;
  Tiling tiling;
  BackwardTask direction[2];
};

// Words of packed weights of one direction.
int64_t packed_words(const Plan& plan);

// The kernel of a plan: forward.cu and backward.cu, compiled for each kind of operands, have these.
using ForwardKernel = void (*)(ForwardParams);
using BackwardKernel = void (*)(BackwardParams);
template <Operands kOperands>
ForwardKernel forward_kernel_for(const Plan& plan);
template <Operands kOperands>
BackwardKernel backward_kernel_for(const Plan& plan);

const char* pack_forward(const Plan& plan, const ForwardParams& params, Stream stream);
const char* pack_backward(const Plan& plan, const BackwardParams& params, Stream stream);

// run(kind) for the kind of operands at hand, which is decltype(kind)::value.
template <class Run>
auto with_operands(Operands operands, Run run) {
  switch (operands) {
    case kBf16:
      return run(std::integral_constant<Operands, kBf16>());
    case kF16:
      return run(std::integral_constant<Operands, kF16>());
    case kTf32:
      return run(std::integral_constant<Operands, kTf32>());
    case kF32:
      return run(std::integral_constant<Operands, kF32>());
  }
  std::abort();  // no such operands
}

FUSED_LSTM_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Row r of a matrix whose rows are `stride` elements apart: one multiplication of 32 bits by 32.
template <class T>
FUSED_LSTM_DEVICE T* row_of(T* matrix, int r, int stride) {
  return matrix + int64_t(r) * stride;
}

FUSED_LSTM_DEVICE Words words_of(const float (&values)[4]) {
  return {
      {float_bits(values[0]), float_bits(values[1]), float_bits(values[2]), float_bits(values[3])}};
}
FUSED_LSTM_DEVICE void floats_of(const Words& words, float (&values)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) values[k] = bits_float(words.word[k]);
}

// The sum of a power of two of parts, in a fixed order: as a tree, where each waits for less.
template <int kCount>
FUSED_LSTM_DEVICE float sum_of(const float (&part)[kCount]) {
  if constexpr (kCount == 1) {
    return part[0];
  } else {
    float half[kCount / 2];
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) half[k] = part[2 * k] + part[2 * k + 1];
    return sum_of(half);
  }
}

// Where a block stands: its direction, its team there, and its slice of the hidden units.
struct Place {
  int direction, group, slice;

  FUSED_LSTM_DEVICE explicit Place(const Tiling& tiling) {
    slice = block_index() % tiling.slices;
    group = block_index() / tiling.slices % tiling.groups;
    direction = block_index() / (tiling.slices * tiling.groups);
  }
};

// A thread's cells, in a block with so many units: the same row of each tile, and one unit; where
// there are more cells than threads, more units, kApart from each other.
template <int kUnits, int NT>
struct CellPlace {
  static constexpr int kRows = 8 * NT, kCells = kUnits * kRows;
  static constexpr int kThreads = kCells < 32 * kWarpsInTeam ? kCells : 32 * kWarpsInTeam;
  static constexpr int kEach = kCells / kThreads, kApart = kThreads / kRows;

  int mu, u;  // the first is of the block's unit 8 mu + u; u below 4 where there is no eight left
  int row;    // of the tile
  int first;  // unit of all

  FUSED_LSTM_DEVICE CellPlace(int thread, int slice) {
    const int cell = thread % kCells;
    mu = cell / (8 * kRows);
    const int together = kUnits % 8 && mu == kUnits / 8 ? 4 : 8;
    u = cell % together;
    row = cell / together % kRows;
    first = slice * kUnits + 8 * mu + u;
  }

  FUSED_LSTM_DEVICE int in_block(int k) const { return 8 * mu + u + k * kApart; }
  FUSED_LSTM_DEVICE int unit(int k) const { return first + k * kApart; }
};

// How far ahead of their use the loads of a step are asked of memory: some 4 us.
constexpr int kStepsPrefetched = 4;

// One tile of the batch in one step: what the walk comes to.
struct Turn {
  int s, tile, row_0;         // step, tile of the team, and the tile's first row of the batch
  RowRun before, now, after;  // of steps s - 1, s and s + 1; none where there is no such step
};

// The steps in the order they are run in, and in each the batch tiles of one team: one tile at
// first_row, the others each `stride` rows further. With the teams in turn between them, each team
// has long and short sequences alike. The rows of a step are looked up a step ahead, for
// who has its last step is to know it.
class Walk {
 public:
  FUSED_LSTM_DEVICE Walk(const Extent& extent, const Tiling& tiling, int first_row, int stride,
                         bool descending)
      : extent_(extent),
        tiling_(tiling),
        first_row_(first_row),
        stride_(stride),
        descending_(descending),
        turn_{-1, tiling.tiles, first_row, {0, 0}, {0, 0}, rows(0)} {}

  FUSED_LSTM_DEVICE const Turn& turn() const { return turn_; }

  // Whether the team has a second tile.
  FUSED_LSTM_DEVICE bool several() const { return first_row_ + stride_ < extent_.B; }

  // Goes on to the next tile that has rows; false past the last.
  FUSED_LSTM_DEVICE bool next() {
    ++turn_.tile;
    turn_.row_0 += stride_;
    while (turn_.tile >= tiling_.tiles || turn_.row_0 >= turn_.now.count) {
      if (++turn_.s >= extent_.T) return false;
      turn_.before = turn_.now;
      turn_.now = turn_.after;
      turn_.after = rows(turn_.s + 1);
      turn_.tile = 0;
      turn_.row_0 = first_row_;
    }
    return true;
  }

  // Of a step, in the order they are run in; none past the last.
  FUSED_LSTM_DEVICE RowRun rows(int step) const {
    if (step >= extent_.T) return {0, 0};
    const int t = descending_ ? extent_.T - 1 - step : step;
    if (extent_.steps) {
      // Both are made use of here, so waited for here: where the branches meet again every call
      // would wait, not only for this load but for those that poll, as they share a scoreboard.
      const RowRun found = extent_.steps[t];
      return {smaller(found.count, extent_.B), found.first & INT32_MAX};
    }
    return {extent_.B, t * extent_.B};
  }

 private:
  const Extent& extent_;
  const Tiling& tiling_;
  int first_row_, stride_;
  bool descending_;
  Turn turn_;
};

}  // namespace fused_lstm::cuda
