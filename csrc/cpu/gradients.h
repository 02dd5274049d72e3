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
// dgates, which are more, as panels: those take fewer instructions to pack, and few are there at a
// time. Threads pack a part of a chunk's strips each, and meet once a chunk: the next one's are
// packed into other memory meanwhile. Where ids stand for one-hot rows, dW_ih comes
// from a table (table.h). Calls of a few rows go another way: gradients_few.h.
#pragma once

#include "claims.h"
#include "gradients_few.h"
#include "gradients_input.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct GradientsPass {
  using Gemm = typename ProductOf<T>::type;
  using Elem = typename Gemm::Elem;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr int R = Gemm::kStripRows;
  static constexpr int64_t kChunk = 192;  // rows of K at a time: a panel is 48 KB
  // Panels packed at once, and rows of K for all of them before the next: a row of dgates is far
  // from the next, so memory gives longer pieces of it sooner (B 32 T 64 I 64 H 256 on Zen 3: 128
  // bytes at 4 to 5 GB/s, a tenth of the pass; 512 bytes in half the time).
  static constexpr int64_t kMostPanels = 4, kPackedRows = Gemm::kPadK > 8 ? Gemm::kPadK : 8;
  // a line more than R * kChunk: strips packed side by side must not meet in the same sets of the
  // cache
  static constexpr int64_t kStripSize = R * kChunk + 64 / int64_t(sizeof(Elem));

  // One product of the rows' transposes: right's `columns` meet left's, which are in blocks of a
  // panel's width.
  struct Job {
    int d;
    bool projection;
    const T* left;
    ColumnBlocks blocks;
    int64_t columns;
    int64_t strips() const { return (columns + R - 1) / R; }
  };

  const Gradients* args;
  Sequence seq;
  int directions, threads;
  int64_t N;
  InputGradient<T> input;
  char *job_base, *private_base;
  int64_t private_bytes;
  Barriers barriers;  // one that nobody meets at, then the one for all threads
  Claims claims;

  GradientsPass(const Gradients* args, int directions, int threads)
      : args(args),
        seq(args[0].seq),
        directions(directions),
        threads(threads),
        N(seq.first_row(seq.T - 1) + seq.rows(seq.T - 1)),
        input(args, directions, N) {
    if (group_products() < kParallelProducts) this->threads = 1;
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 2);
    if (N <= kFewRows) {
      private_base = static_cast<char*>(workspace) + arena.used;
      private_bytes = round_up(few_rows().workspace(), 4096);
      return arena.used + private_bytes * threads;
    }
    claims.take(arena, threads > 1 ? threads : 0);
    input.lay_out(arena);
    // One job is done after another in the same space.
    Arena of_input{nullptr};
    input.lay_out_own(of_input);
    private_bytes = of_input.used;
    int64_t job_bytes = 0;
    for (int d = 0; d < directions; ++d)
      for (int projection = 0; projection < 2; ++projection) {
        Arena shared{nullptr}, own{nullptr};
        lay_out_job(job_of(d, projection), shared, own);
        if (shared.used > job_bytes) job_bytes = shared.used;
        if (own.used > private_bytes) private_bytes = own.used;
      }
    job_base = static_cast<char*>(workspace) + arena.used;
    private_base = job_base + round_up(job_bytes, 4096);
    private_bytes = round_up(private_bytes + 4096, 4096);
    return arena.used + round_up(job_bytes, 4096) + private_bytes * threads;
  }

  int team_size() const { return threads; }
  int64_t group_products() const { return N * 4 * seq.H * (seq.multiplied() + seq.P) * directions; }

  // A thread that is still at it.
  struct Worker {
    int thread;
    char* own;
    int meeting;       // threads that meet
    int64_t step = 0;  // times that something was shared out
  };

  void run(int thread) const {
    if (thread >= threads) return;
    Worker worker{thread, private_base + thread * private_bytes, threads};
    if (N <= kFewRows) return few_rows().run(thread, reinterpret_cast<A*>(worker.own));
    if (thread == 0) claims.clear();
    input.pack(thread, threads);
    for (int d = 0; d < directions; ++d)
      for (int projection = 0; projection < 2; ++projection)
        if (!weight_gradient(job_of(d, projection), worker)) return;
    if (input.wanted() && goes_on(worker)) input_gradient(worker);
  }

  // Meets the others; false where another thread does the rest.
  bool goes_on(Worker& worker) const {
    worker.meeting = barriers[1].wait(worker.meeting);
    return worker.meeting > 0;
  }
  Sharing sharing(const Worker& worker, int64_t count) const {
    const Sharing all{count, worker.thread, threads, claims.first};
    return worker.meeting < threads ? all.alone() : all;
  }
  // Of so many things, those that a worker does in the end.
  StepBlocks blocks_of(Worker& worker, int64_t count) const {
    return {sharing(worker, count), worker.step++, false};
  }

  FewRowsGradients<T> few_rows() const { return {args, seq, directions, threads, N}; }

  Job job_of(int d, bool projection) const {
    const Gradients& a = args[d];
    if (projection)
      return {d, projection, static_cast<const T*>(a.grad_projected),
              ColumnBlocks(seq.P, V, threads), a.grad_weight_hr ? seq.H : 0};
    return {d, projection, static_cast<const T*>(a.dgates), ColumnBlocks(4 * seq.H, V, threads),
            (a.grad_weight_ih ? seq.multiplied() : 0) + (a.grad_weight_hh ? seq.P : 0)};
  }
  // Whether it also adds rows of dgates to a table.
  bool has_table(const Job& job) const {
    return seq.ids && !job.projection && args[job.d].grad_weight_ih;
  }

  // `strips`, of the chunk in work and the next, `sums` and `bias` are all threads'.
  struct Buffers {
    Elem *strips[2], *rows, *step, *panels;
    A* sums;   // [block][strips * R][kWidth]: where there are several chunks
    A* bias;   // (blocks * kWidth)
    A* table;  // (blocks, I, kWidth)
    A* block_sums;
  };

  // As many at once as leave each thread some to share out.
  int64_t panels_of(const Job& job) const {
    const int64_t most = job.blocks.count() / (4 * threads);
    return most < 1 ? 1 : most < kMostPanels ? most : kMostPanels;
  }
  static int64_t panel_size(const Job& job) { return kChunk * job.blocks.width(); }
  // As wide as whole strips and whole vectors of right are.
  static int64_t right_stride(const Job& job) { return round_up(job.strips() * R, V); }

  Buffers lay_out_job(const Job& job, Arena& shared, Arena& own) const {
    const int64_t blocks = job.blocks.count(), block_sums = job.strips() * R * kWidth;
    Buffers buffers;
    buffers.strips[0] = shared.take<Elem>(job.strips() * kStripSize);
    buffers.strips[1] = threads > 1 ? shared.take<Elem>(job.strips() * kStripSize) : nullptr;
    buffers.sums = shared.take<A>(N > kChunk ? blocks * block_sums : 0);
    buffers.bias = shared.take<A>(blocks * kWidth);
    buffers.table = shared.take<A>(has_table(job) ? blocks * seq.I * kWidth : 0);
    buffers.rows = own.take<Elem>(Gemm::kPadK * right_stride(job));
    buffers.step = own.take<Elem>(Gemm::kStepK * right_stride(job));
    buffers.panels = own.take<Elem>(panels_of(job) * panel_size(job));
    buffers.block_sums = own.take<A>(N > kChunk ? 0 : block_sums);
    return buffers;
  }

  // A row of the sequence.
  struct Row {
    int64_t t, b;
  };
  // Rows k to k + count, the first of which is `row`.
  struct Chunk {
    int64_t k, count;
    Row row;
  };
  Chunk chunk_at(int64_t k, const Row& row) const {
    return {k, N - k < kChunk ? N - k : kChunk, row};
  }

  // False where another thread does the rest.
  bool weight_gradient(const Job& job, Worker& worker) const {
    void* const bias = job.projection ? nullptr : args[job.d].grad_bias;
    if (job.columns == 0 && !bias && !has_table(job)) return true;
    Arena shared{job_base}, own{worker.own};
    const Buffers buffers = lay_out_job(job, shared, own);
    if (worker.step > 0 && !goes_on(worker)) return false;  // the job before had the same memory
    const bool ahead = buffers.strips[1];
    Chunk chunk = chunk_at(0, {0, 0});
    pack_right(job, chunk, worker, buffers);
    while (chunk.count > 0) {
      if (!goes_on(worker)) return false;
      const Chunk next = chunk_at(chunk.k + chunk.count, row_after(chunk.row, chunk.count));
      if (ahead) pack_right(job, next, worker, buffers);
      const int64_t panels = panels_of(job);
      StepBlocks groups = blocks_of(worker, (job.blocks.count() + panels - 1) / panels);
      while (groups.next()) add_group(job, chunk, groups.block() * panels, buffers);
      if (!ahead) pack_right(job, next, worker, buffers);
      chunk = next;
    }
    return true;
  }

  Row row_after(Row row, int64_t count) const {
    for (; count > 0; row = {row.t + 1, 0}) {
      const int64_t left = seq.rows(row.t) - row.b;
      if (count < left) return {row.t, row.b + count};
      count -= left;
    }
    return row;
  }

  static Elem* strips_of(const Chunk& chunk, const Buffers& buffers) {
    return buffers.strips[buffers.strips[1] ? chunk.k / kChunk % 2 : 0];
  }

  // A worker's part of right's rows of a chunk, as strips.
  void pack_right(const Job& job, const Chunk& chunk, const Worker& worker,
                  const Buffers& buffers) const {
    constexpr int64_t pad = Gemm::kPadK;
    const int64_t stride = right_stride(job);
    const Range mine = sharing(worker, round_up(chunk.count, pad) / pad).own();
    Row row = row_after(chunk.row, mine.begin * pad);
    Elem* const strips = strips_of(chunk, buffers);
    for (int64_t i = mine.begin * pad; i < mine.end * pad; ++i) {
      const bool there = i < chunk.count;
      fill_right(job, there, row, chunk.k + i, stride, buffers.rows + i % pad * stride);
      if (there) row = row_after(row, 1);
      if ((i + 1) % pad == 0)
        pack_strips<Gemm>(buffers.rows, stride, job.strips(), kStripSize, buffers.step,
                          strips + (i + 1 - pad) * R);
    }
  }

  // Blocks of left's columns from `first` on, as many as are packed at once.
  void add_group(const Job& job, const Chunk& chunk, int64_t first, const Buffers& buffers) const {
    const int64_t all = job.blocks.columns, panels = panels_of(job),
                  left = job.blocks.count() - first;
    const int64_t count = left < panels ? left : panels;
    const auto panel = [&](int64_t i) -> PanelOf<Gemm> {
      return {buffers.panels + i * panel_size(job), chunk.count, job.blocks.vectors_of(first + i),
              all - job.blocks.first(first + i)};
    };
    for (int64_t k = 0; k < chunk.count; k += kPackedRows) {
      const int64_t end = chunk.count - k < kPackedRows ? chunk.count : k + kPackedRows;
      for (int64_t i = 0; i < count; ++i)
        pack_dense_columns(job.left + chunk.k * all + job.blocks.first(first + i), all, panel(i), k,
                           end);
    }
    for (int64_t i = 0; i < count; ++i) add_block(job, chunk, first + i, panel(i), buffers);
  }

  // A block of left's columns over a chunk's rows, on top of what the chunks before have left.
  void add_block(const Job& job, const Chunk& chunk, int64_t block, const PanelOf<Gemm>& panel,
                 const Buffers& buffers) const {
    A* const sums =
        N > kChunk ? buffers.sums + block * job.strips() * R * kWidth : buffers.block_sums;
    const bool last = chunk.k + chunk.count == N;
    add_products(job, chunk, panel, strips_of(chunk, buffers), sums);
    A* const table = has_table(job) ? buffers.table + block * seq.I * kWidth : nullptr;
    const int vectors = panel.vectors;
    const auto left = left_of(job, chunk, block, panel);
    if (table && chunk.k == 0) memset(table, 0, size_t(seq.I * kWidth) * sizeof(A));
    if (table) add_rows_to_table(left, vectors, seq.ids + chunk.k, chunk.count, table);
    if (last) emit(job, block, sums, table);
    if (job.projection || !args[job.d].grad_bias) return;
    A* const bias = buffers.bias + block * kWidth;
    add_rows(chunk, left, vectors, bias);
    for (int v = 0; last && v < vectors; ++v) {
      const int64_t m = job.blocks.first(block) + v * V;
      store_lanes<false>(static_cast<T*>(args[job.d].grad_bias) + m, load(bias + v * V),
                         lanes_at<A>(m, job.blocks.columns));
    }
  }

  void add_products(const Job& job, const Chunk& chunk, const PanelOf<Gemm>& panel,
                    const Elem* strips, A* sums) const {
    static const A zeros[kWidth] = {};
    for (int64_t s = 0; s < job.strips(); ++s, sums += R * kWidth)
      Gemm::run(R, panel.vectors,
                {strips + s * kStripSize, Gemm::strip_stride(), Gemm::strip_step(), panel.panel,
                 panel.steps(), chunk.k ? sums : zeros, chunk.k ? kWidth : 0, sums});
  }

  // Left's rows of a chunk, of one block, by row and vector: from its panel, unless that has pairs
  // of them.
  auto left_of(const Job& job, const Chunk& chunk, int64_t block,
               const PanelOf<Gemm>& panel) const {
    const int64_t all = job.blocks.columns, m = job.blocks.first(block);
    const T* const from = job.left + chunk.k * all + m;
    return [=](int64_t i, int v) __attribute__((always_inline)) {
      if constexpr (Gemm::kStepK == 1) {
        return load(panel.at(i, v));
      } else {
        return load_lanes<T, false>(from + i * all + v * V, lanes_at<A>(m + v * V, all));
      }
    };
  }

  // sums += the sum of a chunk's rows; the first chunk's begin it.
  template <class Left>
  static void add_rows(const Chunk& chunk, const Left& left, int vectors, A* sums) {
    Vec<A> sum[kMaxVectors] = {};
    for (int64_t i = 0; i < chunk.count; ++i)
      for (int v = 0; v < vectors; ++v) sum[v] += left(i, v);
    for (int v = 0; v < vectors; ++v)
      store(sums + v * V, chunk.k ? load(sums + v * V) + sum[v] : sum[v]);
  }

  // Row k of [x | h_{t-1}], or of o tanh(c); zeros behind the last row and the last column.
  void fill_right(const Job& job, bool there, const Row& from, int64_t k, int64_t stride,
                  Elem* row) const {
    const Gradients& a = args[job.d];
    Elem* end = row + stride;
    if (there && job.projection)
      row = append(static_cast<const T*>(a.hidden) + k * seq.H, seq.H, row);
    if (there && !job.projection) {
      if (a.grad_weight_ih && !seq.ids) row = append(input_of<T>(a, from.t, from.b), seq.I, row);
      if (a.grad_weight_hh) row = append(hidden_before<T>(a, from.t, from.b), seq.P, row);
    }
    memset(row, 0, size_t(end - row) * sizeof(Elem));
  }

  static Elem* append(const T* from, int64_t count, Elem* to) {
    copy_row(from, count, to, count);
    return to + count;
  }

  // One block's columns, as rows of the gradients that they belong to.
  void emit(const Job& job, int64_t block, const A* sums, const A* table) const {
    const Gradients& a = args[job.d];
    const auto take = [&](auto* gradient, int64_t count, const A* from) {
      if (!gradient) return;
      for (int v = 0; v < job.blocks.vectors_of(block); ++v)
        for (int64_t n = 0; n < count; n += V) {
          Vec<A> square[V] = {};
          for (int64_t l = 0; l < V && n + l < count; ++l)
            square[l] = load(from + (n + l) * kWidth + v * V);
          transpose<A>(square);
          const int64_t m = job.blocks.first(block) + v * V;
          for (int64_t l = 0; l < V && m + l < job.blocks.columns; ++l)
            store_lanes<false>(gradient + (m + l) * count + n, square[l], lanes_at<A>(n, count));
        }
    };
    if (job.projection) return take(static_cast<T*>(a.grad_weight_hr), seq.H, sums);
    if (table) {
      take(static_cast<A*>(a.grad_weight_ih), seq.I, table);
    } else {
      take(static_cast<T*>(a.grad_weight_ih), seq.I, sums);
    }
    const bool behind = a.grad_weight_ih && !table;
    take(static_cast<T*>(a.grad_weight_hh), seq.P, behind ? sums + seq.I * kWidth : sums);
  }

  void input_gradient(Worker& worker) const {
    Arena arena{worker.own};
    const typename InputGradient<T>::Buffers own = input.lay_out_own(arena);
    StepBlocks chunks = blocks_of(worker, input.chunks());
    while (chunks.next()) input.run(chunks.block(), own);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
