// The gradients of the input and of the weights, from dgates, after the backward through time:
//
//   [dW_ih | dW_hh] = dgates^T [x | h_{t-1}]               (4H, I + P), K runs over all N rows
//   db = the sum of dgates' rows                           (4H)
//   dW_hr = grad_projected^T (o tanh(c))                   (P, H)
//   dx    = dgates W_ih, summed over directions            (N, I)
//
// torch's products would do, but its float GEMM reaches 80 to 93 of this kernel's 220 GFLOP/s a
// core where MKL meets an AMD processor, and its half GEMM has no vector code at all. Threads split
// the rows of the result, so no sum is shared and none depends on their number. K is cut into
// chunks that fit the second-level cache; a chunk's x and h_{t-1} are packed as panels from where
// they lie (any strides, packed or not, h_0 at the ends). Calls of a few rows go another way:
// gradients_few.h.
#pragma once

#include "gradients_few.h"
#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct GradientsPass {
  using Gemm = typename ProductOf<T>::type;
  using Elem = typename Gemm::Elem;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr int R = Gemm::kStripRows;
  static constexpr bool kAsStored = std::is_same_v<Elem, T>;  // operands may be taken as they lie
  static constexpr int64_t kChunk = 192;  // rows of K at a time: a panel is 48 KB
  // a line more than R * kChunk: strips packed side by side must not meet in the same sets of the
  // cache
  static constexpr int64_t kStripSize = R * kChunk + 64 / int64_t(sizeof(Elem));
  static constexpr int64_t kInputRows =
      96;  // rows of dx at a time: a multiple of every tile's rows

  // One transposed product: `rows` of the result from left's columns, `columns` from right's.
  struct Job {
    const T* left;
    int64_t rows;
    ColumnBlocks blocks;
  };

  const Gradients* args;
  Sequence seq;
  int directions, threads;
  int64_t N, g_padded, g_stride;
  bool copy_dgates;
  ColumnBlocks input_columns;
  Elem* input_panels[2];
  char* private_base;
  int64_t private_bytes;
  Barriers barriers;

  GradientsPass(const Gradients* args, int directions, int threads)
      : args(args), seq(args[0].seq), directions(directions), threads(threads) {
    N = seq.offsets ? seq.offsets[seq.T - 1] + seq.batch_sizes[seq.T - 1] : seq.T * seq.B;
    if (N * 4 * seq.H * (seq.I + seq.P) * directions < kParallelProducts) this->threads = 1;
    g_padded = round_up(4 * seq.H, Gemm::kPadK);
    g_stride = round_up(g_padded, 64 / int64_t(sizeof(Elem)));
    copy_dgates = !kAsStored || g_padded != 4 * seq.H;
    input_columns = ColumnBlocks(args[0].grad_input ? seq.I : 0, V, 1);
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 1);
    if (N <= kFewRows) {
      private_base = static_cast<char*>(workspace) + arena.used;
      private_bytes = round_up(few_rows().workspace(), 4096);
      return arena.used + private_bytes * threads;
    }
    for (int d = 0; d < directions; ++d)
      input_panels[d] = arena.take<Elem>(input_columns.padded() * g_padded);
    private_base = static_cast<char*>(workspace) + arena.used;
    // a thread does one job after another in the same space
    private_bytes = 64 * kWidth * int64_t(sizeof(A));
    if (copy_dgates) private_bytes += kInputRows * g_stride * int64_t(sizeof(Elem));
    for (int d = 0; d < directions; ++d)
      for (int projection = 0; projection < 2; ++projection) {
        Arena one{nullptr};
        lay_out_job(job_of(d, projection), one);
        if (one.used > private_bytes) private_bytes = one.used;
      }
    private_bytes = round_up(private_bytes + 4096, 4096);
    return arena.used + private_bytes * threads;
  }

  int team_size() const { return threads; }
  int64_t group_products() const { return 0; }  // its threads meet but once

  void run(int thread) const {
    if (thread >= threads) return;
    char* own = private_base + thread * private_bytes;
    if (N <= kFewRows) return few_rows().run(thread, reinterpret_cast<A*>(own));
    for (int d = 0; d < directions; ++d)
      for (int64_t b = thread; b < input_columns.count(); b += threads) {
        const int64_t first = input_columns.first(b);
        pack_dense_columns<Gemm>(static_cast<const T*>(args[d].weight_ih) + first, seq.I, 4 * seq.H,
                                 input_columns.vectors_of(b), seq.I - first,
                                 input_panels[d] + first * g_padded);
      }
    for (int d = 0; d < directions; ++d)
      for (int projection = 0; projection < 2; ++projection)
        weight_gradient(d, projection, thread, own);
    if (input_columns.columns > 0) {
      barriers[0].wait(threads);
      input_gradient(thread, own);
    }
    Gemm::end();
  }

  FewRowsGradients<T> few_rows() const { return {args, seq, directions, threads, N}; }

  Job job_of(int d, bool projection) const {
    const Gradients& a = args[d];
    if (projection)
      return {static_cast<const T*>(a.grad_projected), seq.P,
              ColumnBlocks(a.grad_weight_hr ? seq.H : 0, V, 1)};
    const int64_t columns = (a.grad_weight_ih ? seq.I : 0) + (a.grad_weight_hh ? seq.P : 0);
    return {static_cast<const T*>(a.dgates), 4 * seq.H, ColumnBlocks(columns, V, 1)};
  }

  struct Buffers {
    Elem *panels, *rows, *strips, *step;
    A* sums;  // [strip][block][R][kWidth], between chunks
    A* tile;  // (R, kWidth): sums that are complete
    A* bias;  // (strips * R)
  };

  Buffers lay_out_job(const Job& job, Arena& arena) const {
    const int64_t strips = (job.rows + R - 1) / R,
                  share_of_strips = (strips + threads - 1) / threads;
    Buffers buffers;
    buffers.panels = arena.take<Elem>(kChunk * job.blocks.padded());
    buffers.rows = arena.take<Elem>(Gemm::kStepK * job.blocks.padded());
    buffers.strips = arena.take<Elem>(share_of_strips * kStripSize);
    buffers.step = arena.take<Elem>((share_of_strips * R + V) * Gemm::kStepK);
    buffers.sums =
        arena.take<A>(N > kChunk ? share_of_strips * job.blocks.count() * R * kWidth : 0);
    buffers.tile = arena.take<A>(R * kWidth + V);
    buffers.bias = arena.take<A>(share_of_strips * R + V);
    return buffers;
  }

  void weight_gradient(int d, bool projection, int thread, char* own) const {
    const Job job = job_of(d, projection);
    const bool bias = !projection && args[d].grad_bias;
    if (job.blocks.columns == 0 && !bias) return;
    Arena arena{own};
    const Buffers buffers = lay_out_job(job, arena);
    const Range mine = share((job.rows + R - 1) / R, thread, threads);
    const Range columns = {mine.begin * R, mine.end * R < job.rows ? mine.end * R : job.rows};
    static const A zeros[kWidth] = {};
    memset(buffers.bias, 0, size_t((mine.end - mine.begin) * R + V) * sizeof(A));
    int64_t t = 0, b = 0;  // the row k of the sequence
    for (int64_t k = 0; k < N; k += kChunk) {
      const int64_t count = N - k < kChunk ? N - k : kChunk, padded = round_up(count, Gemm::kPadK);
      for (int64_t i = 0; i < padded; ++i) {
        Elem* row = buffers.rows + i % Gemm::kStepK * job.blocks.padded();
        fill_right(d, projection, job, i < count, t, b, k + i, row);
        if (i % Gemm::kStepK == Gemm::kStepK - 1)
          scatter(job.blocks, buffers.rows, i / Gemm::kStepK, padded, buffers.panels);
        if (i < count && ++b == seq.rows(t)) {
          b = 0;
          ++t;
        }
      }
      pack_strips<Gemm>(job.left + k * job.rows + columns.begin, job.rows, count,
                        columns.end - columns.begin, buffers.strips, kStripSize, buffers.step);
      if (bias) add_rows(job, k, count, columns, buffers.bias);
      const bool last = k + kChunk >= N;
      for (int64_t block = 0; block < job.blocks.count(); ++block)
        for (int64_t s = 0; s < mine.end - mine.begin; ++s) {
          A* sums = buffers.sums + (s * job.blocks.count() + block) * R * kWidth;
          Gemm::run(R, job.blocks.vectors_of(block),
                    {buffers.strips + s * kStripSize, Gemm::strip_stride(count), Gemm::strip_step(),
                     buffers.panels + job.blocks.first(block) * padded, padded / Gemm::kStepK,
                     k ? sums : zeros, k ? kWidth : 0, last ? buffers.tile : sums});
          if (last) emit(args[d], projection, job, (mine.begin + s) * R, block, buffers.tile);
        }
    }
    for (int64_t m = columns.begin; bias && m < columns.end; m += V)
      store_lanes<false>(static_cast<T*>(args[d].grad_bias) + m,
                         load(buffers.bias + m - columns.begin), lanes_at<A>(m, columns.end));
  }

  // sums += the sum of `count` of left's rows from k on, within `columns`.
  void add_rows(const Job& job, int64_t k, int64_t count, const Range& columns, A* sums) const {
    for (int64_t m = columns.begin; m < columns.end; m += V) {
      const int lanes = lanes_at<A>(m, columns.end);
      const T* from = job.left + k * job.rows + m;
      Vec<A> sum{};
      if (lanes == V) {
        for (int64_t i = 0; i < count; ++i) sum += load(from + i * job.rows);
      } else {
        for (int64_t i = 0; i < count; ++i) sum += load_part(from + i * job.rows, lanes);
      }
      store(sums + m - columns.begin, load(sums + m - columns.begin) + sum);
    }
  }

  // Row k of [x | h_{t-1}], or of o tanh(c); zeros behind the last row and the last column.
  void fill_right(int d, bool projection, const Job& job, bool there, int64_t t, int64_t b,
                  int64_t k, Elem* row) const {
    const Gradients& a = args[d];
    Elem* end = row + job.blocks.padded();
    if (there && projection) row = append(static_cast<const T*>(a.hidden) + k * seq.H, seq.H, row);
    if (there && !projection) {
      if (a.grad_weight_ih) row = append(input_of<T>(a, t, b), seq.I, row);
      if (a.grad_weight_hh) row = append(hidden_before<T>(a, t, b), seq.P, row);
    }
    memset(row, 0, size_t(end - row) * sizeof(Elem));
  }

  static Elem* append(const T* from, int64_t count, Elem* to) {
    copy_row(from, count, to, count);
    return to + count;
  }

  // One step of K, rows one after another, into every panel of the chunk.
  static void scatter(const ColumnBlocks& blocks, const Elem* rows, int64_t step, int64_t padded,
                      Elem* panels) {
    for (int64_t block = 0; block < blocks.count(); ++block) {
      const int64_t first = blocks.first(block);
      const int vectors = blocks.vectors_of(block);
      pack_step<Gemm>(rows + first, blocks.padded(), Gemm::kStepK, vectors * V, step, vectors,
                      panels + first * padded);
    }
  }

  // R rows of one block of the result, from row m on, into the gradients they consist of.
  void emit(const Gradients& a, bool projection, const Job& job, int64_t m, int64_t block,
            const A* tile) const {
    const int64_t first = job.blocks.first(block), end = first + job.blocks.vectors_of(block) * V;
    int64_t column = 0;  // where the gradient begins
    const auto take = [&](void* gradient, int64_t count) {
      if (!gradient) return;
      const int64_t from = first > column ? first : column;
      const int64_t to = end < column + count ? end : column + count;
      for (int64_t r = 0; r < R && m + r < job.rows; ++r)
        for (int64_t n = from; n < to; n += V)
          store_lanes<false>(static_cast<T*>(gradient) + (m + r) * count + n - column,
                             load(tile + r * kWidth + n - first), lanes_at<A>(n, to));
      column += count;
    };
    if (projection) return take(a.grad_weight_hr, seq.H);
    take(a.grad_weight_ih, seq.I);
    take(a.grad_weight_hh, seq.P);
  }

  void input_gradient(int thread, char* own) const {
    const Range chunks = share((N + kInputRows - 1) / kInputRows, thread, threads);
    Arena arena{own};
    A* sums = arena.take<A>(64 * kWidth);
    Elem* copied = arena.take<Elem>(copy_dgates ? kInputRows * g_stride : 0);
    static const A zeros[kWidth] = {};
    T* dx = static_cast<T*>(args[0].grad_input);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      const int64_t begin = chunk * kInputRows,
                    end = begin + kInputRows < N ? begin + kInputRows : N;
      if (copy_dgates && directions == 1) copy_rows(0, begin, end, copied);
      for (int64_t block = 0; block < input_columns.count(); ++block) {
        const int vectors = input_columns.vectors_of(block);
        const int64_t column = input_columns.first(block);
        for (int64_t r = begin, m; r < end; r += m) {
          m = Gemm::next_rows(end - r, vectors);
          for (int d = 0; d < directions; ++d) {
            if (copy_dgates && directions > 1) copy_rows(d, r, r + m, copied);
            const int64_t skip = directions > 1 ? 0 : r - begin;
            const Elem* operand =
                copy_dgates ? copied + skip * g_stride
                            : reinterpret_cast<const Elem*>(args[d].dgates) + r * 4 * seq.H;
            Gemm::run(int(m), vectors,
                      {operand, copy_dgates ? g_stride : 4 * seq.H, Gemm::kStepK,
                       input_panels[d] + column * g_padded, g_padded / Gemm::kStepK,
                       d ? sums : zeros, d ? kWidth : 0, sums});
          }
          for (int i = 0; i < m; ++i)
            for (int v = 0; v < vectors; ++v) {
              const int64_t n = column + v * V;
              const int lanes = lanes_at<A>(n, seq.I);
              store_lanes<false>(dx + (r + i) * seq.I + n, load(sums + i * kWidth + v * V), lanes);
            }
        }
      }
    }
  }

  void copy_rows(int d, int64_t begin, int64_t end, Elem* to) const {
    for (int64_t r = begin; r < end; ++r)
      copy_row(static_cast<const T*>(args[d].dgates) + r * 4 * seq.H, 4 * seq.H,
               to + (r - begin) * g_stride, g_padded);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
