// The recurrent product of one warp: 16 * MT rows of weights times 8 * NT rows of the batch, over
// the warp's share of the columns, with the weights at hand from step to step.
//
// Columns are taken in chunks of 64 bytes. Of a chunk, lane 4g + q loads 16 bytes, quarter q, of
// batch row g: for the tensor cores these are the fragments of two mma, with the columns in an
// order of our own, which the packed weights follow (prepare.cu). In words of 4 bytes, within the
// chunk:
//   weights, tensor cores  register r of mma m in lane 4g + q: row g + 8 (r & 1), word 4q + 2m + r/2
//   weights, plain fp32    word r of half m in lane l: row l % 16, word 8 (l / 16) + 4m + r
//   states                 word w in lane 4g + q: batch row g, word 4q + w
#pragma once

#include "published.cuh"

namespace fused_lstm::cuda {

// Which row of 16 and which word of the chunk lane `lane` holds in word r of part m.
template <Operands kOperands>
FUSED_LSTM_DEVICE void weight_position(int lane, int m, int r, int& row, int& word) {
  if constexpr (kOperands == kF32) {
    row = lane % 16;
    word = lane / 16 * 8 + 4 * m + r;
  } else {
    row = lane / 4 + 8 * (r & 1);
    word = lane % 4 * 4 + 2 * m + r / 2;
  }
}

// --- sums ----------------------------------------------------------------------------------------

// (16 MT, 8 NT) sums in the lanes of a warp. each(put) hands each lane's own out one by one;
// each_unit(put), where tiles of 16 rows are gates i and f, then g and o, of 8 units (forward), the
// four of one cell at a time: 16 bytes for one store. Scalar stores of them met in 8 of the 32
// banks and took four times as long. kChains sums for each tile, which chunks add to in turn: an
// mma takes about 25 cycles, and one can start every few.
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

template <int MT, int NT, int kChains>
class Sums<kF32, MT, NT,
           kChains> {  // plain multiplications: a lane has one row and half of each chunk
 public:
  FUSED_LSTM_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int n = 0; n < 8 * NT; ++n) sum_[mt][n] = 0;
  }

  // `rows` are the batch rows' parts of this chunk in shared memory, `stride` bytes apart.
  template <class Weight>
  FUSED_LSTM_DEVICE void add(const Weight& weight, const char* rows, int stride) {
    const char* half = rows + thread_index() % kLanes / 16 * 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Words a[MT];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) a[mt] = weight(mt, m);
#pragma unroll
      for (int n = 0; n < 8 * NT; ++n) {
        const Words state = load_words(half + n * stride + 16 * m);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int mt = 0; mt < MT; ++mt)
            sum_[mt][n] += bits_float(a[mt].word[r]) * bits_float(state.word[r]);
      }
    }
  }

  template <class Put>
  FUSED_LSTM_DEVICE void each(Put put) const {
    const int lane = thread_index() % kLanes;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          put(mt, lane % 16, 8 * nt + i + (lane >= 16 ? 4 : 0), sum(mt, nt, i));
  }

  // A lane has one gate of each tile: of two rows n, it gives its neighbour's for what it lacks of
  // its own.
  template <class Put>
  FUSED_LSTM_DEVICE void each_unit(Put put) const {
    const int lane = thread_index() % kLanes;
    const bool first = lane % 16 < 8;  // has gates i and g, the other f and o
#pragma unroll
    for (int mu = 0; mu < MT / 2; ++mu)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          Words gates;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float even = sum(2 * mu + half, nt, i), odd = sum(2 * mu + half, nt, i + 1);
            const float other = shuffle_xor(first ? odd : even, 8);
            gates.word[2 * half] = float_bits(first ? even : other);
            gates.word[2 * half + 1] = float_bits(first ? other : odd);
          }
          put(mu, lane % 8, 8 * nt + i + (first ? 0 : 1) + (lane >= 16 ? 4 : 0), gates);
        }
  }

 private:
  // Of row 8 nt + i in the lower half of the warp, of the fourth from there in the upper.
  FUSED_LSTM_DEVICE float sum(int mt, int nt, int i) const {
    const bool upper = thread_index() % kLanes >= 16;
    const float low = sum_[mt][8 * nt + i], high = sum_[mt][8 * nt + 4 + i];
    const float other = shuffle_xor(upper ? low : high, 16);
    return (upper ? high : low) + other;
  }

  float sum_[MT][8 * NT];
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
  const auto add = [&](int slot, int j, const auto& weight) {
    if constexpr (kOperands == kF32) {
      int stride;
      const char* rows = states.in_shared_memory(j, state[slot], stride);
      sums.add(weight, rows, stride);
    } else {
      sums.add(slot, weight, state[slot]);
    }
  };
  // Of a chunk that registers do not hold.
  const auto add_far = [&](int slot, int j) {
    // Read anew for tiles of 8 rows only: with 16 there are no registers for it (plan.cpp).
    if (NT > 1 || j < RT + tiling.shared_chunks) {
      const char* const chunk = shared_memory() + W::shared_here(tiling) + (j - RT) * W::kChunk;
      add(slot, j, [&](int mt, int m) { return W::load(chunk, mt, m); });
    } else {
      const char* const chunk = W::packed_here(packed, tiling) + j * W::kChunk;
      add(slot, j, [&](int mt, int m) { return W::load(chunk, mt, m); });
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
        add(i, first + i, [&](int mt, int m) { return weights.kept[first + i][mt][m]; });
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
