// What the persistent kernels have in common: their parameters, the walk over steps and tiles, and
// how a block is placed among the others.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_lstm::cuda {

// The numbers of a Plan that kernels need, with what follows from them for this call.
struct Tiling {
  int slices, groups, tile_rows, tiles;
  int warps_m, warps_k;   // warps of a block
  int row_tiles, chunks;  // of a warp
  int shared_chunks;      // of these, in shared memory
  int columns;     // of the recurrent weights' rows that are multiplied: H, or 4 padded H backward
  int all_chunks;  // of 64 bytes, that these columns make
  int padded;      // H rounded up to the units of one published word
  int partials, bias, cell, states, state_stride;
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

// How many blocks of this plan's kernel a multiprocessor holds.
template <Operands kOperands>
int resident_forward(const Plan& plan);
template <Operands kOperands>
int resident_backward(const Plan& plan);

template <Operands kOperands>
const char* launch_forward(const Plan& plan, const ForwardParams& params, Stream stream);
template <Operands kOperands>
const char* launch_backward(const Plan& plan, const BackwardParams& params, Stream stream);

const char* pack_forward(const Plan& plan, const ForwardParams& params, Stream stream);
const char* pack_backward(const Plan& plan, const BackwardParams& params, Stream stream);

// Blocks of a team wait for each other, so all of them must run at once.
inline Grid grid_of(const Plan& plan) {
  return {plan.blocks(), plan.threads(), plan.shared_bytes, !plan.alone};
}

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
    default:
      return run(std::integral_constant<Operands, kF32>());
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

// How far ahead of their use the loads of a step are asked of memory: some 4 us.
constexpr int kStepsPrefetched = 4;

// A block's units of the rows of one tile, for prefetching: which sectors, is shared out over the
// block's threads, the last ones first, for they have no cells and wait.
struct Strip {
  static constexpr int kSectorBytes = 32;
  int64_t row;  // that this thread takes
  bool any;
  int first, rows, unit, units;  // this thread's first sector of each row, of how many

  FUSED_LSTM_DEVICE Strip(const Rows& step, int row_0, int rows_of_tile, int first_unit,
                          int of_block, int H) {
    const int worker = thread_count() - 1 - thread_index(), b = row_0 + worker % rows_of_tile;
    row = int64_t(step.first) + b;
    any = b < step.count;
    first = worker / rows_of_tile;
    rows = thread_count() / rows_of_tile;
    unit = first_unit;
    units = H - first_unit < of_block ? H - first_unit : of_block;
  }

  // Of a tensor whose rows are `stride` elements apart, from each of its parts, `part_stride`
  // apart.
  template <class T>
  FUSED_LSTM_DEVICE void prefetch(const T* tensor, int64_t stride, int parts,
                                  int part_stride) const {
    if (any) prefetch_row(tensor + row * stride, parts, part_stride);
  }
  template <class T>
  FUSED_LSTM_DEVICE void prefetch_row(const T* of_row, int parts, int part_stride) const {
    const int sectors = (units * int(sizeof(T)) + kSectorBytes - 1) / kSectorBytes;
    const char* const at = reinterpret_cast<const char*>(of_row + unit);
    for (int k = first; k < parts * sectors; k += rows)
      cuda::prefetch(at + k % parts * part_stride * int(sizeof(T)) + k / parts * kSectorBytes);
  }
};

// The steps in the order they are run in, and in each the batch tiles of one team: one tile at
// first_row, the others each `stride` rows further. With the teams in turn between them, each team
// has long and short sequences alike.
struct Walk {
  int s, tile, row_0;  // step, tile of the team, and the tile's first row of the batch
  Rows before, now;    // rows of step s - 1, none before the first, and of step s

  FUSED_LSTM_DEVICE Walk(const Extent& extent, const Tiling& tiling, int first_row, int stride,
                         bool descending)
      : s(-1),
        tile(0),
        row_0(0),
        before{0, 0},
        now{0, 0},
        extent_(extent),
        tiling_(tiling),
        first_row_(first_row),
        stride_(stride),
        descending_(descending) {}

  // Goes on to the next tile that has rows; false past the last.
  FUSED_LSTM_DEVICE bool next() {
    ++tile;
    row_0 += stride_;
    while (tile >= tiling_.tiles || row_0 >= now.count) {
      if (++s >= extent_.T) return false;
      before = now;
      now = rows(s);
      tile = 0;
      row_0 = first_row_;
    }
    return true;
  }

  FUSED_LSTM_DEVICE Rows after() const { return later(1); }
  FUSED_LSTM_DEVICE Rows later(int steps) const {
    return s + steps < extent_.T ? rows(s + steps) : Rows{0, 0};
  }

 private:
  FUSED_LSTM_DEVICE Rows rows(int step) const {
    const int t = descending_ ? extent_.T - 1 - step : step;
    if (extent_.steps) return extent_.steps[t];
    return {extent_.B, t * extent_.B};
  }

  const Extent& extent_;
  const Tiling& tiling_;
  int first_row_, stride_;
  bool descending_;
};

}  // namespace fused_lstm::cuda
