// The recurrent product of one warp: 16 * MT rows of weights times 8 * NT rows of the batch, over
// the warp's share of the columns, with the weights at hand from step to step.
//
// Columns are taken in chunks of 64 bytes. Of a chunk, lane 4g + q loads 16 bytes, quarter q, of
// batch row g: for the tensor cores these are the fragments of two mma, with the columns in an
// order of our own, which the packed weights follow (prepare.cu). In words of 4 bytes, within the
// chunk:
//   weights, tensor cores  register r of mma m in lane 4g + q: row g + 8 (r & 1), word 4q + 2m + r/2
//   weights, plain fp32    word r of part m in lane Gk + g: entry 4m + r of (16 / G, G / 2), its
//                          rows g, g + G, ... and its words from k G / 2 on; G is kRowLanes
//   states                 word w in lane 4g + q: batch row g, word 4q + w
#pragma once

#include "published.cuh"

namespace fused_lstm::cuda {

// Plain fp32: the lanes among which a tile's 16 rows are shared out; the others have the same rows
// of other words. The fewer, the less is read of the states from shared memory for each product,
// which took most of the time, and the more sums are added up across lanes at the end: forward a
// lane has 2 rows of each tile and 4 words of a chunk, backward 4 rows and 2 words.
template <Pass kPass>
constexpr int kRowLanes = kPass == kForward ? 8 : 4;

// Which row of 16 and which word of the chunk lane `lane` holds in word r of part m.
template <Operands kOperands, Pass kPass>
FUSED_LSTM_DEVICE void weight_position(int lane, int m, int r, int& row, int& word) {
  if constexpr (kOperands == kF32) {
    constexpr int kLanesOfRows = kRowLanes<kPass>, kWords = kLanesOfRows / 2;
    row = lane % kLanesOfRows + (4 * m + r) / kWords * kLanesOfRows;
    word = lane / kLanesOfRows * kWords + (4 * m + r) % kWords;
  } else {
    row = lane / 4 + 8 * (r & 1);
    word = lane % 4 * 4 + 2 * m + r / 2;
  }
}

// Which gate of which of a block's units row `row` of its tile `tile` is, forward: two tiles of 16
// are gates i and f, then g and o, of 8 units; where their number is odd the last one is all gates
// of 4.
FUSED_LSTM_DEVICE void unit_of_row(int tiles, int tile, int row, int& gate, int& unit) {
  const bool alone = tile == tiles - 1 && tile % 2 == 0;
  gate = row / 8 + (alone ? row % 2 : tile % 2) * 2;
  unit = tile / 2 * 8 + (alone ? row % 8 / 2 : row % 8);
}

// --- sums ----------------------------------------------------------------------------------------

// (16 MT, 8 NT) sums in the lanes of a warp. each(put) hands each lane's own out one by one;
// each_unit(put), where rows are gates (forward, see unit_of_row), the four of one cell at a time:
// 16 bytes for one store. Scalar stores of them met in 8 of the 32 banks and took four times as
// long. kChains sums for each tile, which chunks add to in turn: an mma takes about 25 cycles, and
// one can start every few.
template <Operands kOperands, int MT, int NT, int kChains>
class Sums {  // on the tensor cores
 public:
  FUSED_LSTM_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
          for (int r = 0; r < 4; ++r) sum_[mt][nt][chain][r] = 0;
  }

  // weight(mt, m) gives fragments. `slot` counts chunks, and must be known at compile time.
  template <class Weight>
  FUSED_LSTM_DEVICE void add(int slot, const Weight& weight, const Words (&state)[NT]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        const Words a = weight(mt, m);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          float (&sum)[4] = sum_[mt][nt][(2 * slot + m) % kChains];
          const uint32_t b0 = state[nt].word[2 * m], b1 = state[nt].word[2 * m + 1];
          if constexpr (kOperands == kBf16) mma_bf16(sum, a, b0, b1);
          if constexpr (kOperands == kF16) mma_f16(sum, a, b0, b1);
          if constexpr (kOperands == kTf32) mma_tf32(sum, a, b0, b1);
        }
      }
  }

  // Calls put(mt, row, n, sum) for each sum that this lane holds: row of 16, n of 8 NT.
  template <class Put>
  FUSED_LSTM_DEVICE void each(Put put) const {
    const int lane = thread_index() % kLanes, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          put(mt, g + 8 * (r / 2), 8 * nt + 2 * q + r % 2, sum(mt, nt, r));
  }

  // Calls put(mu, u, n, gates) for each cell whose sums this lane holds: of unit 8 mu + u, row n.
  template <class Put>
  FUSED_LSTM_DEVICE void each_unit(Put put) const {
    const int lane = thread_index() % kLanes, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int mu = 0; mu < MT / 2; ++mu)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          Words gates;
#pragma unroll
          for (int gate = 0; gate < 4; ++gate)
            gates.word[gate] = float_bits(sum(2 * mu + gate / 2, nt, gate % 2 * 2 + r));
          put(mu, g, 8 * nt + 2 * q + r, gates);
        }
  }

 private:
  FUSED_LSTM_DEVICE float sum(int mt, int nt, int r) const {
    float all = sum_[mt][nt][0][r];
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain) all += sum_[mt][nt][chain][r];
    return all;
  }

  float sum_[MT][NT][kChains][4];
};

// --- weights -------------------------------------------------------------------------------------

// A warp's weights: chunks below RT in registers, the next in shared memory, and what that does not
// hold is read anew each time, from L2.
template <int MT, int RT>
struct Weights {
  Words kept[RT][MT][2];
  int chunks;  // of this warp

  static constexpr int kFragment = kLanes * sizeof(Words);  // bytes from one Words to the next
  static constexpr int kChunk = MT * 2 * kFragment;

  // `rests` is where the shared parts of all warps start.
  FUSED_LSTM_DEVICE void load(const Words* packed, const Tiling& tiling, char* rests) {
    const int warp = thread_index() / kLanes;
    const char* const all = packed_here(packed, tiling);
    const int first = warp * tiling.chunks;
    chunks = tiling.all_chunks - first;
    chunks = chunks < 0 ? 0 : chunks < tiling.chunks ? chunks : tiling.chunks;
#pragma unroll
    for (int j = 0; j < RT; ++j)
#pragma unroll
      for (int part = 0; part < 2 * MT; ++part)
        kept[j][part / 2][part % 2] =
            j < chunks ? load_words(all + j * kChunk + part * kFragment) : Words{};
    char* const rest = rests + shared_here(tiling);
    for (int part = 0; part < tiling.shared_chunks * MT * 2;
         ++part)  // each lane reads its own only
      store_words(rest + part * kFragment, load_words(all + RT * kChunk + part * kFragment));
  }

  // This lane's part of its warp's first chunk; of the first one in shared memory, in bytes. Found
  // anew each time: as members they would take registers that there are not.
  FUSED_LSTM_DEVICE static const char* packed_here(const Words* packed, const Tiling& tiling) {
    const int warp = thread_index() / kLanes + block_index() % tiling.slices * kWarpsInTeam;
    return reinterpret_cast<const char*>(packed + thread_index() % kLanes) +
           warp * tiling.chunks * kChunk;
  }
  FUSED_LSTM_DEVICE static int shared_here(const Tiling& tiling) {
    return thread_index() / kLanes * tiling.shared_chunks * kChunk +
           thread_index() % kLanes * int(sizeof(Words));
  }

  FUSED_LSTM_DEVICE static Words load(const char* chunk, int mt, int m) {
    return load_words(chunk + (mt * 2 + m) * kFragment);
  }
};

// --- the product ---------------------------------------------------------------------------------

// Adds the warp's product to the sums; `state` holds what states.set_out() asked for.
template <Operands kOperands, int MT, int NT, int kChains, int RT>
FUSED_LSTM_DEVICE void multiply(Sums<kOperands, MT, NT, kChains>& sums,
                                const Weights<MT, RT>& weights, const Words* packed,
                                const Tiling& tiling,
                                const PublishedStates<kOperands, MT, NT>& states,
                                Words (&state)[PublishedStates<kOperands, MT, NT>::kAhead][NT]) {
  using W = Weights<MT, RT>;
  constexpr int kAhead = states.kAhead;
  const int chunks = weights.chunks;
  // Of a chunk that registers do not hold.
  const auto add_far = [&](int slot, int j) {
    // Read anew for tiles of 8 rows only: with more there are no registers for it (plan.cpp).
    if (NT > 1 || j < RT + tiling.shared_chunks) {
      const char* const chunk = shared_memory() + W::shared_here(tiling) + (j - RT) * W::kChunk;
      sums.add(slot, [&](int mt, int m) { return W::load(chunk, mt, m); }, state[slot]);
    } else {
      const char* const chunk = W::packed_here(packed, tiling) + j * W::kChunk;
      sums.add(slot, [&](int mt, int m) { return W::load(chunk, mt, m); }, state[slot]);
    }
  };
  // The chunks of a group set out together, after the last product of the group before: all loads
  // share a scoreboard, and a product that came after one of them would wait for its trip to L2.
#pragma unroll
  for (int first = 0; first < RT; first += kAhead) {
    states.wait(first, chunks, state);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < RT && first + i < chunks)
        sums.add(i, [&](int mt, int m) { return weights.kept[first + i][mt][m]; }, state[i]);
    if (first + kAhead > RT && chunks > RT)
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i >= RT && first + i < chunks) add_far(i, first + i);
    states.fetch(first + kAhead, chunks, state);
  }
  for (int first = (RT + kAhead - 1) / kAhead * kAhead; first < chunks; first += kAhead) {
    states.wait(first, chunks, state);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < chunks) add_far(i, first + i);
    states.fetch(first + kAhead, chunks, state);
  }
}

}  // namespace fused_lstm::cuda
