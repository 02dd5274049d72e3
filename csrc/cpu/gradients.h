// The gradients of the input and of the weights, from dgates, after the backward through time:
//
//   [dW_ih | dW_hh] = dgates^T [x | h_{t-1}]               (4H, I + P), K runs over all N rows;
//                                                          computed as its transpose
//   db = the sum of dgates' rows                           (4H)
//   dW_hr = grad_projected^T (o tanh(c))                   (P, H)
//   dx    = dgates W_ih, summed over directions            (N, I)
//
// torch's products would do, but its float GEMM reaches 80 to 93 of this kernel's 220 GFLOP/s a
// core where MKL meets an AMD processor, and its half GEMM has no vector code at all. Threads split
// the rows of the result, so no sum is shared and none depends on their number. K is cut into
// chunks that fit the second-level cache; a chunk's x and h_{t-1} are packed as strips, the
// product's operand, from where they lie (any strides, packed or not, h_0 at the ends), and its
// dgates, which are more, as panels: those take fewer instructions to pack, and only one is there
// at a time. Calls of a few rows go another way: gradients_few.h.
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

  // One product of the rows' transposes: right's `columns` meet left's, which are in blocks of a
  // panel's width.
  struct Job {
    const T* left;
    ColumnBlocks blocks;
    int64_t columns;
    int64_t strips() const { return (columns + R - 1) / R; }
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
  }

  FewRowsGradients<T> few_rows() const { return {args, seq, directions, threads, N}; }

  Job job_of(int d, bool projection) const {
    const Gradients& a = args[d];
    if (projection)
      return {static_cast<const T*>(a.grad_projected), ColumnBlocks(seq.P, V, threads),
              a.grad_weight_hr ? seq.H : 0};
    return {static_cast<const T*>(a.dgates), ColumnBlocks(4 * seq.H, V, threads),
            (a.grad_weight_ih ? seq.I : 0) + (a.grad_weight_hh ? seq.P : 0)};
  }

  struct Buffers {
    Elem *strips, *rows, *step, *panel;
    A* sums;  // [block][strips * R][kWidth]: of the blocks that aren't complete
    A* bias;  // (blocks * kWidth)
  };

  // As wide as whole strips and whole vectors of right are.
  static int64_t right_stride(const Job& job) { return round_up(job.strips() * R, V); }

  Buffers lay_out_job(const Job& job, Arena& arena) const {
    const int64_t blocks = (job.blocks.count() + threads - 1) / threads;
    Buffers buffers;
    buffers.strips = arena.take<Elem>(job.strips() * kStripSize);
    buffers.rows = arena.take<Elem>(Gemm::kPadK * right_stride(job));
    buffers.step = arena.take<Elem>(Gemm::kStepK * right_stride(job));
    buffers.panel = arena.take<Elem>(kChunk * job.blocks.width());
    buffers.sums = arena.take<A>((N > kChunk ? blocks : 1) * job.strips() * R * kWidth);
    buffers.bias = arena.take<A>(blocks * kWidth);
    return buffers;
  }

  void weight_gradient(int d, bool projection, int thread, char* own) const {
    const Job job = job_of(d, projection);
    void* const bias = projection ? nullptr : args[d].grad_bias;
    if (job.columns == 0 && !bias) return;
    Arena arena{own};
    const Buffers buffers = lay_out_job(job, arena);
    const Range mine = share(job.blocks.count(), thread, threads);
    memset(buffers.bias, 0, size_t((mine.end - mine.begin) * kWidth) * sizeof(A));
    Row row{0, 0};
    for (int64_t k = 0; k < N; k += kChunk) {
      const int64_t count = N - k < kChunk ? N - k : kChunk;
      pack_right(d, projection, job, k, count, row, buffers);
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const int64_t index = block - mine.begin;
        A* sums = buffers.sums + (N > kChunk ? index * job.strips() * R * kWidth : 0);
        add_chunk(job, k, count, block, sums, buffers);
        if (k + kChunk >= N) emit(args[d], projection, job, block, sums);
        if (bias) add_rows(job, k, count, block, buffers.bias + index * kWidth);
      }
    }
    for (int64_t block = mine.begin; bias && block < mine.end; ++block)
      for (int v = 0; v < job.blocks.vectors_of(block); ++v) {
        const int64_t m = job.blocks.first(block) + v * V;
        store_lanes<false>(static_cast<T*>(bias) + m,
                           load(buffers.bias + (block - mine.begin) * kWidth + v * V),
                           lanes_at<A>(m, job.blocks.columns));
      }
  }

  // A row of the sequence.
  struct Row {
    int64_t t, b;
  };

  // Right's rows k to k + count, the first of which is `row`, as strips; `row` becomes the one
  // behind them.
  void pack_right(int d, bool projection, const Job& job, int64_t k, int64_t count, Row& row,
                  const Buffers& buffers) const {
    const int64_t stride = right_stride(job), padded = round_up(count, Gemm::kPadK);
    for (int64_t i = 0; i < padded; ++i) {
      fill_right(d, projection, i < count, row, k + i, stride,
                 buffers.rows + i % Gemm::kPadK * stride);
      if (i < count && ++row.b == seq.rows(row.t)) row = {row.t + 1, 0};
      if ((i + 1) % Gemm::kPadK == 0)
        pack_strips<Gemm>(buffers.rows, stride, job.strips(), kStripSize, buffers.step,
                          buffers.strips + (i + 1 - Gemm::kPadK) * R);
    }
  }

  // A block of left's columns over rows k to k + count, on top of `sums`.
  void add_chunk(const Job& job, int64_t k, int64_t count, int64_t block, A* sums,
                 const Buffers& buffers) const {
    static const A zeros[kWidth] = {};
    const int64_t m = job.blocks.first(block), all = job.blocks.columns;
    const int vectors = job.blocks.vectors_of(block);
    pack_dense_columns<Gemm>(job.left + k * all + m, all, count, vectors, all - m, buffers.panel);
    const int64_t steps = round_up(count, Gemm::kPadK) / Gemm::kStepK;
    for (int64_t s = 0; s < job.strips(); ++s, sums += R * kWidth)
      Gemm::run(R, vectors,
                {buffers.strips + s * kStripSize, Gemm::strip_stride(), Gemm::strip_step(),
                 buffers.panel, steps, k ? sums : zeros, k ? kWidth : 0, sums});
  }

  // sums += the sum of left's rows k to k + count, of one block.
  void add_rows(const Job& job, int64_t k, int64_t count, int64_t block, A* sums) const {
    const int64_t all = job.blocks.columns;
    for (int v = 0; v < job.blocks.vectors_of(block); ++v) {
      const int64_t m = job.blocks.first(block) + v * V;
      const int lanes = lanes_at<A>(m, all);
      const T* from = job.left + k * all + m;
      Vec<A> sum{};
      if (lanes == V) {
        for (int64_t i = 0; i < count; ++i) sum += load(from + i * all);
      } else {
        for (int64_t i = 0; i < count; ++i) sum += load_part(from + i * all, lanes);
      }
      store(sums + v * V, load(sums + v * V) + sum);
    }
  }

  // Row k of [x | h_{t-1}], or of o tanh(c); zeros behind the last row and the last column.
  void fill_right(int d, bool projection, bool there, const Row& from, int64_t k, int64_t stride,
                  Elem* row) const {
    const Gradients& a = args[d];
    Elem* end = row + stride;
    if (there && projection) row = append(static_cast<const T*>(a.hidden) + k * seq.H, seq.H, row);
    if (there && !projection) {
      if (a.grad_weight_ih) row = append(input_of<T>(a, from.t, from.b), seq.I, row);
      if (a.grad_weight_hh) row = append(hidden_before<T>(a, from.t, from.b), seq.P, row);
    }
    memset(row, 0, size_t(end - row) * sizeof(Elem));
  }

  static Elem* append(const T* from, int64_t count, Elem* to) {
    copy_row(from, count, to, count);
    return to + count;
  }

  // One block's columns, as rows of the gradients that they belong to.
  void emit(const Gradients& a, bool projection, const Job& job, int64_t block,
            const A* sums) const {
    const auto take = [&](void* gradient, int64_t count) {
      if (!gradient) return;
      for (int v = 0; v < job.blocks.vectors_of(block); ++v)
        for (int64_t n = 0; n < count; n += V) {
          Vec<A> square[V] = {};
          for (int64_t l = 0; l < V && n + l < count; ++l)
            square[l] = load(sums + (n + l) * kWidth + v * V);
          transpose<A>(square);
          const int64_t m = job.blocks.first(block) + v * V;
          for (int64_t l = 0; l < V && m + l < job.blocks.columns; ++l)
            store_lanes<false>(static_cast<T*>(gradient) + (m + l) * count + n, square[l],
                               lanes_at<A>(n, count));
        }
      sums += count * kWidth;
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
