// dx = dgates W_ih, summed over directions (N, I), a chunk of rows at a time: gradients.h shares
// the chunks out.
#pragma once

#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct InputGradient {
  using Gemm = typename ProductOf<T>::type;
  using Elem = typename Gemm::Elem;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr bool kAsStored = std::is_same_v<Elem, T>;  // operands may be taken as they lie
  static constexpr int64_t kRows = 96;  // of a chunk: a multiple of every tile's rows

  // A thread's own.
  struct Buffers {
    A* sums;       // (64, 4V): one tile
    Elem* copied;  // (kRows, stride): dgates in the product's type
  };

  const Gradients* args;
  Sequence seq;
  int directions;
  int64_t N, padded, stride;  // padded, stride: of a row of dgates
  bool copies;
  ColumnBlocks columns;  // none where it isn't wanted
  Elem* panels[2];       // W_ih

  InputGradient(const Gradients* args, int directions, int64_t N)
      : args(args), seq(args[0].seq), directions(directions), N(N) {
    padded = round_up(4 * seq.H, Gemm::kPadK);
    stride = round_up(padded, 64 / int64_t(sizeof(Elem)));
    copies = !kAsStored || padded != 4 * seq.H;
    columns = ColumnBlocks(args[0].grad_input ? seq.I : 0, V, 1);
  }

  bool wanted() const { return columns.columns > 0; }
  int64_t chunks() const { return (N + kRows - 1) / kRows; }

  void lay_out(Arena& arena) {
    for (int d = 0; d < directions; ++d) panels[d] = arena.take<Elem>(columns.padded() * padded);
  }
  Buffers lay_out_own(Arena& arena) const {
    Buffers own;
    own.sums = arena.take<A>(64 * kWidth);
    own.copied = arena.take<Elem>(copies ? kRows * stride : 0);
    return own;
  }

  void pack(int thread, int threads) const {
    for (int d = 0; d < directions; ++d)
      for (int64_t b = thread; b < columns.count(); b += threads) {
        const int64_t first = columns.first(b);
        pack_dense_columns<Gemm>(
            static_cast<const T*>(args[d].weight_ih) + first, seq.I,
            {panels[d] + first * padded, 4 * seq.H, columns.vectors_of(b), seq.I - first});
      }
  }

  void run(int64_t chunk, const Buffers& own) const {
    const int64_t begin = chunk * kRows, end = begin + kRows < N ? begin + kRows : N;
    if (copies && directions == 1) copy_rows(0, begin, end, own.copied);
    for (int64_t block = 0; block < columns.count(); ++block) {
      const int vectors = columns.vectors_of(block);
      for (int64_t r = begin, m; r < end; r += m) {
        m = Gemm::next_rows(end - r, vectors);
        for (int d = 0; d < directions; ++d) add_product(d, block, r, m, begin, own);
        write(block, r, m, own.sums);
      }
    }
  }

 private:
  // Rows r to r + m, of a chunk from `begin` on, of a block of columns: direction 0 begins the sums.
  void add_product(int d, int64_t block, int64_t r, int64_t m, int64_t begin,
                   const Buffers& own) const {
    static const A zeros[kWidth] = {};
    if (copies && directions > 1) copy_rows(d, r, r + m, own.copied);
    const int64_t skip = directions > 1 ? 0 : r - begin;
    const Elem* operand = copies ? own.copied + skip * stride
                                 : reinterpret_cast<const Elem*>(args[d].dgates) + r * 4 * seq.H;
    Gemm::run(int(m), columns.vectors_of(block),
              {operand, copies ? stride : 4 * seq.H, Gemm::kStepK,
               panels[d] + columns.first(block) * padded, padded / Gemm::kStepK,
               d ? own.sums : zeros, d ? kWidth : 0, own.sums});
  }

  void write(int64_t block, int64_t r, int64_t m, const A* sums) const {
    T* dx = static_cast<T*>(args[0].grad_input);
    for (int i = 0; i < m; ++i)
      for (int v = 0; v < columns.vectors_of(block); ++v) {
        const int64_t n = columns.first(block) + v * V;
        store_lanes<false>(dx + (r + i) * seq.I + n, load(sums + i * kWidth + v * V),
                           lanes_at<A>(n, seq.I));
      }
  }

  void copy_rows(int d, int64_t begin, int64_t end, Elem* to) const {
    for (int64_t r = begin; r < end; ++r)
      copy_row(static_cast<const T*>(args[d].dgates) + r * 4 * seq.H, 4 * seq.H,
               to + (r - begin) * stride, padded);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
