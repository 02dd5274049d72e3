// The forward of one layer, all its directions, in one parallel region over the whole sequence.
//
// Each thread owns a range of rows and a range of unit blocks (V hidden units with their four
// gates, one vector a gate). Per step and block: x_t W_ih^T + b into `inputs`, then h_{t-1} W_hh^T
// on top of it, six rows (AVX-512) at a time, and the cell update on those sums while they are in
// the first-level cache. With few rows the input's product is taken for several steps at once, so
// that W_ih is read once for all of them. Calls of a few rows in all pack nothing and take both
// products from the weights as they lie (dense.h). Where ids stand for one-hot rows, x W_ih^T + b
// is a row of a table (table.h).
//
// Kept in the workspace: both weights packed into panels once per call; h_t twice (one step reads
// the one, writes the other, so one barrier a step is enough) in the product's type, rows padded
// with zeros; c_t in float or double. With a projection, o tanh(c) takes h_t's place in the first
// phase of a step, and a second phase makes h_t of it.
#pragma once

#include "cell.h"
#include "claims.h"
#include "dense.h"
#include "forward_plan.h"
#include "table.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct ForwardPass : ForwardPlan {
  // The other passes begin with the same lines: a base of T would have to be named in each of them.
  using Gemm = typename ProductOf<T>::type;
  using Elem = typename Gemm::Elem;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr bool kAsStored = std::is_same_v<Elem, T>;  // operands may be taken as they lie

  struct Direction {
    Elem *input_panels, *hidden_panels, *projection_panels;
    A* table;           // (blocks, I, 4V): x W_ih^T + b of each id
    A* bias;            // (blocks, 4V)
    Elem* h[2];         // (B, h_stride)
    Elem* unprojected;  // (B, m_stride): o tanh(c) when there is a projection
    A* c;               // (B, c_stride)
  };
  struct Private {
    A* sums;    // (kMaxRows, 4V): one tile
    A* inputs;  // (chunk_rows, 4V): x W_ih^T + b of one block, where it isn't taken ahead
    Elem* x;    // (chunk_rows, x_stride): input rows of a chunk in the product's type
  };
  // What a thread has to do of direction d.
  struct Part {
    int d;
    Range rows, projected;  // projected: blocks of the projection
    int meeting;            // threads that share its steps
    Barrier* barrier;
    Sharing sharing;  // of the blocks of units
    A* ahead = nullptr;
    Private own = {};
  };
  // A step of direction d, the s-th of its recurrence. Its rows begin at `first` of the packed
  // batch, `active` of them are this thread's, and below `next` they take part in the step after.
  struct Step {
    int d;
    int64_t s, t, first, next;
    Range active;
  };
  // One product: `out` (rows, 4V) = init + operand of the weights, operand's rows `stride` apart.
  struct Tile {
    int64_t rows;
    const Elem* operand;
    int64_t stride;
    const A* init;
    int64_t init_stride;
    A* out;
  };

  const Forward* args;
  Direction direction[2];
  A* inputs_ahead;  // (groups, slots, blocks, chunk_rows, 4V): x W_ih^T + b
  char* private_base;
  int64_t private_bytes;
  Barriers barriers;  // one for all threads, then one a row group of each direction
  Claims claims;

  ForwardPass() = default;
  ForwardPass(const Forward* args, int directions, int threads, int64_t most_steps = 0)
      : ForwardPlan(args[0].seq, directions, threads, kind(args[0].seq), most_steps), args(args) {}

  static ForwardKind kind(const Sequence& seq) {
    return {V,
            Gemm::kPadK,
            Gemm::max_rows(4),
            sizeof(Elem),
            kSharedProducts<Gemm>,
            kAsStored,
            worth_dense<T, Elem>(seq.T * seq.B, seq.multiplied() + seq.P)};
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 1 + directions * team.row_groups);
    claims.take(arena, team.helpers(directions));
    for (int d = 0; d < directions; ++d) {
      Direction& dir = direction[d];
      dir.input_panels = arena.take<Elem>(dense ? 0 : blocks * kWidth * x_padded);
      dir.hidden_panels = arena.take<Elem>(dense ? 0 : blocks * kWidth * h_padded);
      dir.projection_panels = arena.take<Elem>(projection.padded() * m_padded);
      dir.table = arena.take<A>(seq.ids && !dense ? blocks * kWidth * seq.I : 0);
      dir.bias = arena.take<A>(blocks * kWidth);
      for (Elem*& h : dir.h) h = arena.take<Elem>(seq.B * h_stride);
      dir.unprojected = arena.take<Elem>(seq.projected ? seq.B * m_stride : 0);
      dir.c = arena.take<A>(seq.B * c_stride);
    }
    const int64_t groups = team.directions * team.row_groups;
    inputs_ahead = arena.take<A>(ahead ? groups * slots * blocks * chunk_rows * kWidth : 0);
    const int64_t shared = arena.used;
    Arena one{nullptr};
    lay_out_private(one);
    private_bytes = round_up(one.used, 4096);  // a page apart: no two threads share a line
    private_base = static_cast<char*>(workspace) + shared;
    return shared + private_bytes * slots * team.threads();
  }

  Private lay_out_private(Arena& arena) const {
    Private own;
    own.sums = arena.take<A>(kMaxRows * kWidth);
    own.inputs = arena.take<A>(ahead ? 0 : chunk_rows * kWidth);
    own.x = arena.take<Elem>(copy_input ? chunk_rows * x_stride : 0);
    return own;
  }

  int team_size() const { return team.threads(); }
  int64_t group_products() const { return products() / team.row_groups; }

  void run(int thread) const {
    if (thread >= team.threads()) return;
    const Place place(team, thread);
    prepare(thread, team.threads());
    barriers[0].wait(team.threads());
    for (int d = place.direction; d < directions; d += team.directions)
      run_direction(part_of(d, place, thread));
  }

  // Weights into panels, initial states into place: shared out among so many threads.
  void prepare(int thread, int threads) const {
    if (thread == 0) claims.clear();
    for (int64_t item = thread; item < blocks * directions; item += threads)
      pack_block(int(item / blocks), item % blocks);
    for (int64_t item = thread; item < projection.count() * directions; item += threads) {
      const int d = int(item / projection.count());
      const int64_t b = item % projection.count(), first = projection.first(b);
      const int width = projection.vectors_of(b) * V;
      auto column = [&](int n) { return first + n < seq.P ? first + n : int64_t(-1); };
      pack_dense_k<Gemm>(static_cast<const T*>(args[d].weight_hr), seq.H, seq.H, width, column,
                         direction[d].projection_panels + first * m_padded);
    }
    for (int64_t item = thread; item < seq.B * directions; item += threads) {
      const int d = int(item / seq.B);
      const int64_t b = item % seq.B;
      const Direction& dir = direction[d];
      for (Elem* h : dir.h)
        copy_row(static_cast<const T*>(args[d].h_0) + b * seq.P, seq.P, h + b * h_stride, h_stride);
      if (seq.projected) memset(dir.unprojected + b * m_stride, 0, size_t(m_stride) * sizeof(Elem));
      const T* c_0 = static_cast<const T*>(args[d].c_0) + b * seq.H;
      for (int64_t u = 0; u < c_stride; ++u)
        dir.c[b * c_stride + u] = u < seq.H ? A(to_acc(c_0[u])) : A(0);
    }
  }

  void pack_block(int d, int64_t block) const {
    const Forward& a = args[d];
    const Direction& dir = direction[d];
    const auto column = gate_column<V>(block * V, seq.H);
    A* const bias = dir.bias + block * kWidth;
    add_biases<T>(a.bias_ih, a.bias_hh, column, bias);
    if (dense) return;
    if (seq.ids) {
      pack_table(static_cast<const A*>(a.weight_ih), seq.I, column, bias, table(d, block));
    } else {
      pack_dense_k<Gemm>(static_cast<const T*>(a.weight_ih), seq.I, seq.I, kWidth, column,
                         dir.input_panels + block * kWidth * x_padded);
    }
    pack_dense_k<Gemm>(static_cast<const T*>(a.weight_hh), seq.P, seq.P, kWidth, column,
                       dir.hidden_panels + block * kWidth * h_padded);
  }

  A* table(int d, int64_t block) const { return direction[d].table + block * kWidth * seq.I; }

  // Rows of this group that step t has.
  Range rows_at(int64_t t, const Range& rows) const {
    const int64_t active = seq.rows(t);
    return {rows.begin, active < rows.end ? active : rows.end};
  }

  // A thread's part of direction d, with the buffers of one of its slots.
  Part part_of(int d, const Place& place, int thread, int slot = 0) const {
    Part part{d,
              share(seq.B, place.row_group, team.row_groups),
              share(projection.count(), place.unit_group, team.unit_groups),
              team.unit_groups,
              &barriers[1 + d * team.row_groups + place.row_group],
              claims.sharing(team, d, place, blocks)};
    const int64_t group = place.direction * team.row_groups + place.row_group;
    part.ahead = inputs_ahead + (group * slots + slot) * blocks * chunk_rows * kWidth;
    Arena arena{private_base + (thread * slots + slot) * private_bytes};
    part.own = lay_out_private(arena);
    return part;
  }

  void run_direction(Part part) const {
    for (int64_t s = 0; s < seq.T; s += chunk_steps) {
      take_inputs(part, s);
      if (ahead && part.sharing.claims && !goes_on(part)) return;  // for whoever helps
      if (!run_steps(part, s)) return;
    }
    write_c_n(part);
  }

  // Of the chunk that begins at step s of the recurrence: its rows in one piece, and x W_ih^T.
  void take_inputs(const Part& part, int64_t s) const {
    if (copy_input) gather_inputs(part, s);
    if (!ahead) return;
    int64_t count = 0;
    for (int64_t i = s; i < seq.T && i < s + chunk_steps; ++i)
      count += count_of(rows_at(args[part.d].seq.step(i, false), part.rows));
    const Range units = part.sharing.own();
    for (int64_t block = units.begin; block < units.end; ++block)
      input_product(part.d, block, part.own.x, x_stride, count,
                    part.ahead + block * chunk_rows * kWidth);
  }

  // The chunk's steps; false where another thread does them and all that follow.
  bool run_steps(Part& part, int64_t first) const {
    const Forward& a = args[part.d];
    const bool turns = Order::turns(part.rows.end - part.rows.begin, sizeof(Elem));
    int64_t inputs_at = 0;  // where in the chunk this step's rows begin
    for (int64_t s = first; s < seq.T && s < first + chunk_steps; ++s) {
      const int64_t t = a.seq.step(s, false);
      const Range active = rows_at(t, part.rows);
      const int64_t next = s + 1 < seq.T ? seq.rows(a.seq.step(s + 1, false)) : 0;
      const Step step{part.d, s, t, seq.first_row(t), next, active};
      StepBlocks units(part.sharing, s, turns && s % 2);
      while (units.next()) {
        const int64_t block = units.block();
        const A* inputs = part.own.inputs;
        if (ahead) {
          inputs = part.ahead + (block * chunk_rows + inputs_at) * kWidth;
        } else if (seq.ids) {
          look_up(step, block, part.own.inputs);
        } else if (!at_once && !active.empty()) {
          const Elem* x = copy_input ? part.own.x
                                     : reinterpret_cast<const Elem*>(input_row(a, t, active.begin));
          input_product(part.d, block, x, copy_input ? x_stride : a.input_stride_b,
                        count_of(active), part.own.inputs);
        }
        hidden_step(step, block, units.following(), inputs, part.own);
      }
      inputs_at += count_of(active);
      if (!goes_on(part)) return false;
      if (seq.projected) {
        for (int64_t block = part.projected.begin; block < part.projected.end; ++block)
          projection_step(step, block, part.own.sums);
        if (!goes_on(part)) return false;
      }
    }
    return true;
  }

  bool goes_on(Part& part) const {
    return meet(*part.barrier, part.meeting, part.sharing, part.projected, projection.count());
  }

  void write_c_n(const Part& part) const {
    const Range units = part.sharing.own();
    for (int64_t b = part.rows.begin; b < part.rows.end; ++b)
      for (int64_t block = units.begin; block < units.end; ++block) {
        const int64_t u = block * V;
        store_lanes<false>(static_cast<T*>(args[part.d].c_n) + b * seq.H + u,
                           load(direction[part.d].c + b * c_stride + u), lanes_at<A>(u, seq.H));
      }
  }

  static int64_t count_of(const Range& r) { return r.empty() ? 0 : r.end - r.begin; }

  const T* input_row(const Forward& a, int64_t t, int64_t b) const {
    return static_cast<const T*>(a.input) + seq.offset(t, b, a.input_stride_t, a.input_stride_b);
  }

  // Input rows of the chunk that begins at step s, one after another.
  void gather_inputs(const Part& part, int64_t s) const {
    const Forward& a = args[part.d];
    Elem* to = part.own.x;
    for (int64_t i = s; i < seq.T && i < s + chunk_steps; ++i) {
      const int64_t t = a.seq.step(i, false);
      const Range active = rows_at(t, part.rows);
      for (int64_t b = active.begin; b < active.end; ++b, to += x_stride)
        copy_row(input_row(a, t, b), seq.I, to, x_stride);
    }
  }

  // inputs[r] = x[r] W_ih^T + b_ih + b_hh for one block of units.
  void input_product(int d, int64_t block, const Elem* x, int64_t stride, int64_t rows,
                     A* inputs) const {
    for (int64_t r = 0, m; r < rows; r += m) {
      m = Gemm::next_rows(rows - r, 4);
      product(
          d, block, false,
          {m, x + r * stride, stride, direction[d].bias + block * kWidth, 0, inputs + r * kWidth});
    }
  }

  // The same of a step's rows, by their ids.
  void look_up(const Step& step, int64_t block, A* inputs) const {
    const int64_t* ids = seq.ids + step.first + step.active.begin;
    if (!dense) return take_rows(table(step.d, block), ids, count_of(step.active), inputs);
    take_columns(static_cast<const A*>(args[step.d].weight_ih), seq.I,
                 gate_column<V>(block * V, seq.H), direction[step.d].bias + block * kWidth, ids,
                 count_of(step.active), inputs);
  }

  // x W_ih^T, or with `hidden` h W_hh^T, for one block of units.
  void product(int d, int64_t block, bool hidden, const Tile& tile,
               const void* to_fetch = nullptr) const {
    const int rows = int(tile.rows);
    if (dense) {
      const auto part = dense_part(d, block, tile.operand, tile.stride, hidden);
      const int lanes = lanes_at<A>(block * V, seq.H);
      dense_product<false, T, Elem>(rows,
                                    {lanes, tile.init, tile.init_stride, tile.out, 1, {part}});
      return;
    }
    const int64_t padded = hidden ? h_padded : x_padded;
    const Elem* panels = hidden ? direction[d].hidden_panels : direction[d].input_panels;
    Gemm::run(rows, 4,
              {tile.operand, tile.stride, Gemm::kStepK, panels + block * kWidth * padded,
               padded / Gemm::kStepK, tile.init, tile.init_stride, tile.out, to_fetch});
  }

  DensePart<T, Elem> dense_part(int d, int64_t block, const Elem* operand, int64_t stride,
                                bool hidden) const {
    const T* weights = static_cast<const T*>(hidden ? args[d].weight_hh : args[d].weight_ih);
    const int64_t K = hidden ? seq.P : seq.I;
    return {weights + block * V * K, K, seq.H * K, K, operand, stride};
  }

  void hidden_step(const Step& step, int64_t block, int64_t following, const A* inputs,
                   const Private& own) const {
    const Direction& dir = direction[step.d];
    const int64_t u = block * V;
    const int lanes = lanes_at<A>(u, seq.H);
    const Elem* h = dir.h[step.s % 2];
    NextPanel next_panel(far && following != block,
                         dir.hidden_panels + following * kWidth * h_padded,
                         kWidth * h_padded * int64_t(sizeof(Elem)));
    const Range& active = step.active;
    const int64_t lines_a_row =
        Gemm::kFetches || active.empty() ? 0 : next_panel.lines() / count_of(active) + 1;
    for (int64_t r = active.begin, m; r < active.end; r += m) {
      m = Gemm::next_rows(active.end - r, 4);
      const int64_t row = r - active.begin;
      if (at_once) {
        const auto x = dense_part(step.d, block, own.x + row * x_stride, x_stride, false);
        const auto hidden = dense_part(step.d, block, h + r * h_stride, h_stride, true);
        dense_product<false, T, Elem>(
            int(m), {lanes, dir.bias + block * kWidth, 0, own.sums, 2, {x, hidden}});
      } else {
        product(step.d, block, true,
                {m, h + r * h_stride, h_stride, inputs + row * kWidth, kWidth, own.sums},
                Gemm::kFetches ? next_panel.part(h_padded / Gemm::kStepK) : nullptr);
      }
      const auto fetch = [&]() __attribute__((always_inline)) { next_panel.fetch(lines_a_row); };
      if (lanes == V) {
        cells<true>(step, r, int(m), u, lanes, own.sums, fetch);
      } else {
        cells<false>(step, r, int(m), u, lanes, own.sums, fetch);
      }
    }
  }

  // Gates, cells and hidden states of rows b to b + rows, units u to u + lanes.
  template <bool whole, class Fetch>
  void cells(const Step& step, int64_t b, int rows, int64_t u, int lanes, A* sums,
             const Fetch& fetch) const {
    const Forward& a = args[step.d];
    const Direction& dir = direction[step.d];
    const auto save = [&](int r, const Vec<A>* gate, Vec<A> c) __attribute__((always_inline)) {
      if constexpr (!Gemm::kFetches) fetch();
      if (!a.gates) return;
      const int64_t row = step.first + b + r;
      T* gates = static_cast<T*>(a.gates) + row * 4 * seq.H + u;
      for (int g = 0; g < 4; ++g) store_lanes<whole>(gates + g * seq.H, gate[g], lanes);
      store_lanes<whole>(static_cast<T*>(a.cells) + row * seq.H + u, c, lanes);
    };
    const auto emit_row = [&](int r, Vec<A> hidden) __attribute__((always_inline)) {
      if (seq.projected) {
        store_operand<T, whole>(dir.unprojected + (b + r) * m_stride + u, hidden, lanes);
      } else {
        emit<whole>(step, b + r, u, lanes, hidden);
      }
    };
    update_cells(rows, sums, dir.c + b * c_stride + u, c_stride, save, emit_row);
  }

  // h_t, where the caller, the next step and, after a sequence's last step, h_n want it.
  template <bool whole>
  void emit(const Step& step, int64_t b, int64_t u, int lanes, Vec<A> h) const {
    const Forward& a = args[step.d];
    T* output = static_cast<T*>(a.output) + (step.first + b) * a.output_stride + u;
    store_lanes<whole>(output, h, lanes);
    Elem* operand = direction[step.d].h[(step.s + 1) % 2] + b * h_stride + u;
    store_operand<T, whole>(operand, h, lanes);
    if (b >= step.next) store_lanes<whole>(static_cast<T*>(a.h_n) + b * seq.P + u, h, lanes);
  }

  void projection_step(const Step& step, int64_t block, A* sums) const {
    const Direction& dir = direction[step.d];
    const int vectors = projection.vectors_of(block);
    const int64_t column = projection.first(block);
    const Range& active = step.active;
    static const A zeros[kWidth] = {};
    for (int64_t r = active.begin, m; r < active.end; r += m) {
      m = Gemm::next_rows(active.end - r, vectors);
      Gemm::run(
          int(m), vectors,
          {dir.unprojected + r * m_stride, m_stride, Gemm::kStepK,
           dir.projection_panels + column * m_padded, m_padded / Gemm::kStepK, zeros, 0, sums});
      for (int i = 0; i < m; ++i)
        for (int v = 0; v < vectors; ++v) {
          const int64_t u = column + v * V;
          emit<false>(step, r + i, u, lanes_at<A>(u, seq.P), load(sums + i * kWidth + v * V));
        }
    }
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
