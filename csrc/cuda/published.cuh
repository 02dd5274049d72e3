// What the blocks of a team publish in global memory and poll there: h forward, dgates backward.
// Why there is no flag: README.md.
#pragma once

#include "persistent.cuh"
#include "storage.cuh"

namespace fused_lstm::cuda {

constexpr int kLanes = 32;

// Bounds a wait for another block. By the clock, not by tries: a neighbour's kernel may hold
// multiprocessors for seconds, and then nothing is wrong. No correct launch comes near the bound.
class Patience {
 public:
  FUSED_LSTM_DEVICE void lose() {
    constexpr int kTriesALook = 1 << 10;  // the clock takes longer to read than a register
    constexpr uint32_t kMilliseconds = 60'000;
    if (++tries_ % kTriesALook) return;
    const uint32_t now = milliseconds();
    if (tries_ == kTriesALook) since_ = now;
    if (now - since_ > kMilliseconds) give_up();
  }

 private:
  uint32_t tries_ = 0, since_ = 0;
};

// Chunks of published states that a warp has in flight: what sets out together takes one trip to L2
// together. As many as nvcc's report allows, for nothing may spill: backward, where a warp has
// 4 H / 8 columns, all of them up to H 1024 in 16 bits.
template <Operands kOperands, int MT, int NT>
constexpr int chunks_ahead() {
  if (kOperands == kF32) return MT == 1 ? 16 : MT < 4 ? 8 : 4;
  if (MT == 1) return NT == 1 ? 16 : 6;
  if (MT == 2) return 8;
  if (NT == 4) return 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // whose addresses take more registers
  if (NT == 2) return 2;
#endif
  return kOperands == kTf32 ? 6 / NT : 5 - NT;
}

// What a lane fetches of its rows of a tile.
template <int NT>
struct Aim {
  int rows[NT];    // this lane's part of its row, from the warp's first column on, counted in 16
                   // bytes from PublishedStates::all (a register each, where pointers are two)
  int limits[NT];  // of this lane's chunks: none where the row takes no part
};

// The states that the blocks of a team publish in global memory: each lane polls the very words
// that it multiplies until none is kNotYet, so no flag, no fence and no second trip to L2.
template <Operands kOperands, int MT, int NT>
struct PublishedStates {
  static constexpr int kAhead = chunks_ahead<kOperands, MT, NT>();
  const char* all;
  Aim<NT> aim;
  char* stage_at;  // kF32: (kStagedChunks, 8 NT, 64 bytes) of this warp in shared memory
  int first;       // of this lane's part of its rows, counted in 16 bytes

  FUSED_LSTM_DEVICE PublishedStates(const void* published, const Tiling& tiling, char* shared) {
    const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
    all = static_cast<const char*>(published);
    stage_at = shared + tiling.states + warp * kStagedChunks * kStagedChunk;
    first = warp * tiling.chunks * (kChunkBytes / 16) + lane % 4;
  }

  // of_row(n, row, takes_part) says of row n of a tile which row of the published states it is, and
  // whether it takes part. Rows are `stride` bytes apart.
  template <class OfRow>
  FUSED_LSTM_DEVICE Aim<NT> aim_at(const Tiling& tiling, int stride, int chunks,
                                   OfRow of_row) const {
    constexpr int kElement = sizeof(typename Storage<kOperands>::Type);
    constexpr int kColumns = kChunkBytes / kElement;
    const int within = (tiling.columns - first * (16 / kElement) + kColumns - 1) / kColumns;
    Aim<NT> aim;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      int row;
      bool takes_part;
      of_row(8 * nt + thread_index() % kLanes / 4, row, takes_part);
      aim.rows[nt] = row * (stride / 16) + first;
      aim.limits[nt] = takes_part ? smaller(within, chunks) : 0;
    }
    return aim;
  }

  // A branch for so many chunks: one for each would take longer than the loads.
  static constexpr int kTogether = 4;

  FUSED_LSTM_DEVICE void set_out(const Aim<NT>& for_tile, int chunks, Words (&state)[kAhead][NT]) {
    aim = for_tile;
    fetch(0, chunks, state);
  }

  // kAhead chunks of the warp's `chunks`, from `first` on.
  FUSED_LSTM_DEVICE void fetch(int first, int chunks, Words (&state)[kAhead][NT]) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i % kTogether == 0 && first + i >= chunks) return;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        state[i][nt] = load_published_or_zero(first + i < aim.limits[nt], at(first + i, nt));
    }
  }

  // Until all that was fetched of the chunks from `first` on is there. What is missing is fetched
  // again all at once: one by one, each would cost a trip to L2 of its own.
  FUSED_LSTM_DEVICE void wait(int first, int chunks, Words (&state)[kAhead][NT]) const {
    for (Patience patience;; patience.lose()) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i % kTogether == 0 && first + i >= chunks) break;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const bool there = published(state[i][nt]);
          load_published(!there, at(first + i, nt), state[i][nt]);
          missing |= !there;
        }
      }
      if (!warp_any(missing)) return;
    }
  }

  static constexpr int kStagedChunk = 8 * NT * kChunkBytes;

  // Puts kStagedChunks chunks of those that are there, from slot `first` on, into shared memory in
  // the place of those before, and says where.
  FUSED_LSTM_DEVICE const char* stage(int first, const Words (&state)[kAhead][NT]) const {
    const int lane = thread_index() % kLanes;
    warp_barrier();  // until no lane reads those before
#pragma unroll
    for (int i = 0; i < kStagedChunks; ++i)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
        store_words(stage_at + i * kStagedChunk + nt * 8 * kChunkBytes + lane * 16,
                    state[first + i][nt]);
    warp_barrier();
    return stage_at;
  }

 private:
  FUSED_LSTM_DEVICE const char* at(int j, int nt) const {
    return all + int64_t(aim.rows[nt]) * 16 + j * kChunkBytes;
  }
};

}  // namespace fused_lstm::cuda
