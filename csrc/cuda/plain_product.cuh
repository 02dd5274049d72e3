// The recurrent product of one warp where its operands are float32 and tf32 is not allowed: plain
// multiplications, each chunk of the states by way of shared memory. Layouts are in product.cuh.
#pragma once

#include "product.cuh"

namespace fused_lstm::cuda {

// Plain multiplications: a lane has some rows of each tile and some words of each chunk.
template <int MT, int NT, int kChains>
class Sums<kF32, MT, NT, kChains> {
 public:
  FUSED_LSTM_DEVICE void clear() {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int n = 0; n < 8 * NT; ++n) sum_[mt][j][n] = 0;
  }

  // `rows` are the batch rows' parts of this chunk in shared memory.
  template <class Weight>
  FUSED_LSTM_DEVICE void add(const Weight& weight, const char* rows) {
    float entry[MT][8];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const Words words = weight(mt, m);
#pragma unroll
        for (int r = 0; r < 4; ++r) entry[mt][4 * m + r] = bits_float(words.word[r]);
      }
    const char* const own = rows + thread_index() % kLanes / kRowLanes * int(sizeof(Part));
#pragma unroll
    for (int n = 0; n < 8 * NT; ++n) {
      const Part state = load_element(reinterpret_cast<const Part*>(own + n * kChunkBytes));
#pragma unroll
      for (int k = 0; k < kWords; ++k)
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int j = 0; j < kRows; ++j) sum_[mt][j][n] += entry[mt][j * kWords + k] * state.of[k];
    }
  }

  template <class Put>
  FUSED_LSTM_DEVICE void each(Put put) const {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int j = 0; j < kRows; ++j)
#pragma unroll
        for (int n = 0; n < 8 * NT; n += kWordLanes)
          put(mt, g() + kRowLanes * j, n + k(), sum<kWordLanes>(sum_[mt][j], n));
  }

  // Of two tiles a lane has all gates of one unit; of one alone two gates, and gives its neighbour
  // those of one row n for the neighbour's of the other.
  template <class Put>
  FUSED_LSTM_DEVICE void each_unit(Put put) const {
#pragma unroll
    for (int mu = 0; mu < MT / 2; ++mu)
#pragma unroll
      for (int n = 0; n < 8 * NT; n += kWordLanes) {
        Words gates;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          gates.word[gate] = float_bits(sum<kWordLanes>(sum_[2 * mu + gate / 2][gate % 2], n));
        put(mu, g(), n + k(), gates);
      }
    if constexpr (MT % 2 == 1) {
      const bool first = g() % 2 == 0;  // has gates i and f, the neighbour g and o
#pragma unroll
      for (int n = 0; n < 8 * NT; n += 2 * kWordLanes) {
        Words gates;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float one = sum<kWordLanes>(sum_[MT - 1][j], n);
          const float two = sum<kWordLanes>(sum_[MT - 1][j], n + kWordLanes);
          const float other = shuffle_xor(first ? two : one, 1);
          gates.word[j] = float_bits(first ? one : other);
          gates.word[2 + j] = float_bits(first ? other : two);
        }
        put(MT / 2, g() / 2, n + (first ? 0 : kWordLanes) + k(), gates);
      }
    }
  }

 private:
  static constexpr Pass kPass = MT == 1 ? kBackward : kForward;
  static constexpr int kRowLanes = cuda::kRowLanes<kPass>;
  static constexpr int kWordLanes = kLanes / kRowLanes;  // that have the same rows
  static constexpr int kRows = 16 / kRowLanes, kWords = kRowLanes / 2;
  struct alignas(4 * kWords) Part {  // of a chunk of a batch row
    float of[kWords];
  };

  FUSED_LSTM_DEVICE static int g() { return thread_index() % kRowLanes; }
  FUSED_LSTM_DEVICE static int k() { return thread_index() % kLanes / kRowLanes; }

  // Adds up what kCount lanes have, of kCount rows n from `first` on: of each lane's own of these,
  // the k-th. Halves are exchanged, so that what a lane gives away it need not add up.
  template <int kCount>
  FUSED_LSTM_DEVICE static float sum(const float (&of)[8 * NT], int first) {
    if constexpr (kCount == 1) {
      return of[first];
    } else {
      const float low = sum<kCount / 2>(of, first), high = sum<kCount / 2>(of, first + kCount / 2);
      const bool upper = k() & kCount / 2;
      const float other = shuffle_xor(upper ? low : high, kRowLanes * kCount / 2);
      return (upper ? high : low) + other;
    }
  }

  float sum_[MT][kRows][8 * NT];
};

// Adds the warp's product to the sums; `state` holds what states.set_out() asked for. A few chunks
// at a time lie in shared memory, and a loop goes over them: unrolled for all that are in flight,
// the code would be larger than what a multiprocessor keeps of it.
template <int MT, int NT, int kChains, int RT>
FUSED_LSTM_DEVICE void multiply(Sums<kF32, MT, NT, kChains>& sums, const Weights<MT, RT>& weights,
                                const Words* packed, const Tiling& tiling,
                                const PublishedStates<kF32, MT, NT>& states,
                                Words (&state)[PublishedStates<kF32, MT, NT>::kAhead][NT]) {
  using W = Weights<MT, RT>;
  constexpr int kAhead = states.kAhead, kStaged = kStagedChunks;
  static_assert(kAhead % kStaged == 0);
  const int chunks = weights.chunks;
  const auto add_far = [&](const char* chunk, const char* rows) {
    sums.add([&](int mt, int m) { return W::load(chunk, mt, m); }, rows);
  };
  const auto add_group = [&](int first, bool is_first) {
    states.wait(first, chunks, state);
#pragma unroll
    for (int part = 0; part < kAhead; part += kStaged) {
      if (first + part >= chunks) return;
      const char* const rows = states.stage(part, state);
      // All of the group is in shared memory now, and the next one's trip is in the shadow of the
      // products to come.
      if (part + kStaged == kAhead) states.fetch(first + kAhead, chunks, state);
      int i = 0;
      if (is_first)
#pragma unroll
        for (; i < smaller(kStaged, RT - part); ++i)
          if (part + i < chunks)
            sums.add([&](int mt, int m) { return weights.kept[part + i][mt][m]; },
                     rows + i * states.kStagedChunk);
      const int end = smaller(chunks - first - part, kStaged);
      const int in_shared_memory = smaller(RT + tiling.shared_chunks - first - part, end);
      const char* const near = shared_memory() + W::shared_here(tiling);
#pragma unroll 1
      for (; i < in_shared_memory; ++i)
        add_far(near + (first + part + i - RT) * W::kChunk, rows + i * states.kStagedChunk);
      if (i < end) {
        const char* const far = W::packed_here(packed, tiling);
#pragma unroll 1
        for (; i < end; ++i)
          add_far(far + (first + part + i) * W::kChunk, rows + i * states.kStagedChunk);
      }
    }
  };
  add_group(0, true);
  for (int first = kAhead; first < chunks; first += kAhead) add_group(first, false);
}

}  // namespace fused_lstm::cuda
