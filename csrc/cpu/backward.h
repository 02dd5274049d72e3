// The backward of one layer through time, all its directions, in one parallel region over the whole
// sequence.
//
// Step by step, opposite to the forward: dh_t = dy_t + dgates of the step before W_hh, for up to
// eight blocks of columns, and on those, while they are in the second-level cache, row by row the
// gradient of the cell:
//
//   tc = tanh(c_t);  dc += dh o (1 - tc^2);  do = dh tc;  di = dc g;  dg = dc i;  df = dc c_{t-1};
//   dc *= f
//
// which gives dgates, before the activations: the next step's operand, and the buffer that the
// products for dx, dW and db read afterwards (gradients.h). Each thread owns a range of rows and of
// columns (hidden units).
//
// What the cells read and write lies in pieces of a block's width that are far from each other: of
// several blocks at once they are long enough for the processor to fetch ahead. With each tile's
// cells right behind its product they took 240 cycles a vector, 60 of them computing (Zen 3, B 32 T
// 64 H 256), and of the whole pass a fifth.
//
// Kept in the workspace: W_hh packed once per call, K running over the 4H gates; dc in float or
// double; dgates of one step in the product's type where the saved buffer does not serve as the
// operand itself. With a projection, a step has two phases: dh_t (P columns), then dh_t W_hr and
// the cell (H columns).
#pragma once

#include "activations.h"
#include "claims.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct BackwardPass {
  using Gemm = typename ProductOf<T>::type;
  using Elem = typename Gemm::Elem;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>;
  static constexpr int kWidth = kTileWidth<A>;
  static constexpr bool kAsStored = std::is_same_v<Elem, T>;  // operands may be taken as they lie
  // Sums that wait for their cells: few enough for the second-level cache.
  static constexpr int64_t kGroupBytes = 64 << 10, kMostBlocks = 8;

  struct Direction {
    Elem *hidden_panels, *projection_panels;
    Elem* dgates[2];  // (B, g_stride)
    Elem* dh;         // (B, p_stride): gradient of h_t when there is a projection
    A* dc;            // (B, c_stride)
  };

  const Backward* args;
  Sequence seq;
  int directions;
  Team team;
  ColumnBlocks hidden,
      units;  // columns of dh (P), and of the cell (H) where a projection makes them differ
  int64_t g_padded, p_padded, g_stride, p_stride, c_stride;
  int64_t group_rows, group_blocks;  // whose products are taken before their cells
  bool copy_dgates;
  bool far;  // W_hh is beyond the second-level cache
  Direction direction[2];
  char* private_base;
  int64_t private_bytes;
  Barriers barriers;  // one for all threads, then one a row group of each direction
  Claims claims;

  BackwardPass(const Backward* args, int directions, int threads)
      : args(args), seq(args[0].seq), directions(directions) {
    g_padded = round_up(4 * seq.H, Gemm::kPadK);
    p_padded = round_up(seq.P, Gemm::kPadK);
    constexpr int64_t line = 64 / sizeof(Elem);
    g_stride = round_up(g_padded, line);
    p_stride = round_up(p_padded, line);
    c_stride = round_up(seq.H, V);
    copy_dgates = !kAsStored || g_padded != 4 * seq.H;
    const int64_t weights = 4 * seq.H * seq.P;
    const int64_t bytes = weights * int64_t(sizeof(Elem));
    team = Team::choose(
        threads, directions, seq,
        {seq.B * weights, kSharedProducts<Gemm>, bytes, Gemm::max_rows(4), (seq.P + V - 1) / V});
    far = bytes > kNearBytes * team.unit_groups;
    hidden = ColumnBlocks(seq.P, V, team.unit_groups, widest());
    group_rows = (seq.B + team.row_groups - 1) / team.row_groups;
    group_blocks = kGroupBytes / (group_rows * kWidth * int64_t(sizeof(A)));
    group_blocks = group_blocks < 1 ? 1 : group_blocks < kMostBlocks ? group_blocks : kMostBlocks;
    units = ColumnBlocks(seq.projected ? seq.H : 0, V, team.unit_groups);
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 1 + directions * team.row_groups);
    claims.take(arena, team.helpers(directions));
    for (int d = 0; d < directions; ++d) {
      Direction& dir = direction[d];
      dir.hidden_panels = arena.take<Elem>(hidden.padded() * g_padded);
      dir.projection_panels = arena.take<Elem>(units.padded() * p_padded);
      for (Elem*& dgates : dir.dgates)
        dgates = arena.take<Elem>(copy_dgates ? seq.B * g_stride : 0);
      dir.dh = arena.take<Elem>(seq.projected ? seq.B * p_stride : 0);
      dir.dc = arena.take<A>(seq.B * c_stride);
    }
    const int64_t shared = arena.used;
    const int64_t sums = group_blocks * group_rows;
    private_bytes =
        4096 + round_up((sums > kMaxRows ? sums : kMaxRows) * kWidth * int64_t(sizeof(A)),
                        4096);  // no two threads share a line
    private_base = static_cast<char*>(workspace) + shared;
    return shared + private_bytes * team.threads();
  }

  // Vectors of a block. With 16 registers a tile takes two at a time anyway: of long panels, of
  // which two in turn must fit the second-level cache, those are half as many bytes (Zen 3, 512 KB:
  // B 16 and B 32 H 512 5 to 12 % faster, H 1150 9 to 35; at H 256, 128 KB, slower).
  int widest() const {
    constexpr int64_t kLongPanel = 160 << 10;
    const bool is_long = g_padded * kWidth * int64_t(sizeof(Elem)) > kLongPanel;
    return kRegisters == 16 && is_long ? 2 : kMaxVectors;
  }

  int team_size() const { return team.threads(); }
  int64_t group_products() const { return seq.T * seq.B * 4 * seq.H * seq.P / team.row_groups; }

  void run(int thread) const {
    if (thread >= team.threads()) return;
    const Place place(team, thread);
    A* sums = reinterpret_cast<A*>(private_base + thread * private_bytes);
    prepare(thread);
    barriers[0].wait(team.threads());
    for (int d = place.direction; d < directions; d += team.directions)
      run_direction(d, place, sums);
  }

  void prepare(int thread) const {
    const int threads = team.threads();
    if (thread == 0) claims.clear();
    for (int d = 0; d < directions; ++d) {
      for (int64_t b = thread; needs_product() && b < hidden.count(); b += threads) {
        const int64_t first = hidden.first(b);
        pack_dense_columns<Gemm>(static_cast<const T*>(args[d].weight_hh) + first, seq.P,
                                 {direction[d].hidden_panels + first * g_padded, 4 * seq.H,
                                  hidden.vectors_of(b), seq.P - first});
      }
      for (int64_t b = thread; b < units.count(); b += threads) {
        const int64_t first = units.first(b);
        pack_dense_columns<Gemm>(static_cast<const T*>(args[d].weight_hr) + first, seq.H,
                                 {direction[d].projection_panels + first * p_padded, seq.P,
                                  units.vectors_of(b), seq.H - first});
      }
      const Direction& dir = direction[d];
      for (int64_t b = thread; b < seq.B; b += threads) {
        if (copy_dgates)
          for (Elem* dgates : dir.dgates)
            memset(dgates + b * g_stride, 0, size_t(g_stride) * sizeof(Elem));
        if (seq.projected) memset(dir.dh + b * p_stride, 0, size_t(p_stride) * sizeof(Elem));
        const T* grad_c_n = static_cast<const T*>(args[d].grad_c_n);
        for (int64_t u = 0; u < c_stride; ++u)
          dir.dc[b * c_stride + u] =
              grad_c_n && u < seq.H ? A(to_acc(grad_c_n[b * seq.H + u])) : A(0);
      }
    }
  }

  bool needs_product() const { return seq.T > 1 || args[0].grad_h_0; }

  // One step: rows below `before` come from step `from` (dgates there), rows from there to `active`
  // enter with grad_h_n, and rows from `active` to `before` leave into grad_h_0. The first
  // `continued` rows have their c_{t-1} from row first_cell of the saved ones on, the others in
  // c_0.
  struct Step {
    int64_t s, t, from, active, before, continued, first_cell;
  };

  void run_direction(int d, const Place& place, A* sums) const {
    const Backward& a = args[d];
    const Range rows = share(seq.B, place.row_group, team.row_groups);
    Range cells = share(units.count(), place.unit_group, team.unit_groups);
    Barrier& barrier = barriers[1 + d * team.row_groups + place.row_group];
    Sharing sharing = claims.sharing(team, d, place, hidden.count());
    int meeting = team.unit_groups;
    const auto goes_on = [&] { return meet(barrier, meeting, sharing, cells, units.count()); };
    const bool turns = Order::turns(rows.end - rows.begin, sizeof(Elem));
    Step step{};
    const int64_t rounds =
        a.grad_h_0 ? seq.T + 1 : seq.T;  // the last only takes what is left into grad_h_0
    for (int64_t s = 0; s < rounds; ++s) {
      step.s = s;
      step.t = s < seq.T ? a.seq.step(s, true) : 0;
      step.active = s < seq.T ? seq.rows(step.t) : 0;
      step.continued = s < seq.T ? a.seq.continued(step.t) : 0;
      step.first_cell = step.continued > 0 ? seq.first_row(a.seq.before(step.t)) : 0;
      hidden_step(d, step, rows, StepBlocks(sharing, s, turns && s % 2), sums);
      if (seq.projected && s < seq.T) {
        if (!goes_on()) return;
        for (int64_t block = cells.begin; block < cells.end; ++block)
          projection_step(d, block, step, rows, sums);
      }
      step.from = step.t;
      step.before = step.active;
      if (s < seq.T && !goes_on()) return;
    }
    // grad_c_0: the threads that own a row's units have written all of its dc
    const Range own = seq.projected ? cells : sharing.own();
    const ColumnBlocks& columns = seq.projected ? units : hidden;
    for (int64_t b = rows.begin; b < rows.end; ++b)
      for (int64_t block = own.begin; block < own.end; ++block)
        for (int v = 0; v < columns.vectors_of(block); ++v) {
          const int64_t u = columns.first(block) + v * V;
          store_lanes<false>(static_cast<T*>(a.grad_c_0) + b * seq.H + u,
                             load(direction[d].dc + b * c_stride + u), lanes_at<A>(u, seq.H));
        }
  }

  // The blocks `first` to `first` + group_blocks of which a thread has the products; a bit each.
  struct Group {
    int64_t first = 0;
    unsigned blocks = 0;
  };

  // A thread's blocks of a step, several of them at a time.
  void hidden_step(int d, const Step& step, const Range& rows, StepBlocks blocks, A* sums) const {
    Group group;
    while (blocks.next()) {
      const int64_t block = blocks.block(), place = block % group_blocks;
      if (group.blocks && block - place != group.first) {
        cells_step(d, step, rows, group, sums);
        group.blocks = 0;
      }
      products(d, block, blocks.following(), step, rows, sums + place * group_rows * kWidth);
      group.first = block - place;
      group.blocks |= 1u << place;
    }
    if (group.blocks) cells_step(d, step, rows, group, sums);
  }

  // Where the rows end that a step has something to do for.
  int64_t end_of(const Backward& a, const Step& step, const Range& rows) const {
    const int64_t needed = a.grad_h_0 && step.before > step.active ? step.before : step.active;
    return needed < rows.end ? needed : rows.end;
  }

  // sums (rows, kWidth) = dgates W_hh of a block's units, where there are dgates.
  void products(int d, int64_t block, int64_t following, const Step& step, const Range& rows,
                A* sums) const {
    const Backward& a = args[d];
    const Direction& dir = direction[d];
    static const A zeros[kWidth] = {};
    const int vectors = hidden.vectors_of(block);
    const int64_t column = hidden.first(block), steps = g_padded / Gemm::kStepK;
    const int64_t needed = end_of(a, step, rows), end = needed < step.before ? needed : step.before;
    const Elem* operand = copy_dgates ? dir.dgates[step.s % 2]
                                      : reinterpret_cast<const Elem*>(a.dgates) +
                                            seq.first_row(step.from) * 4 * seq.H;
    const int64_t stride = copy_dgates ? g_stride : 4 * seq.H;
    NextPanel next_panel(far && following != block,
                         dir.hidden_panels + hidden.first(following) * g_padded,
                         hidden.vectors_of(following) * V * g_padded * int64_t(sizeof(Elem)));
    for (int64_t r = rows.begin, m; r < end; r += m, sums += m * kWidth) {
      m = Gemm::next_rows(end - r, vectors);
      Gemm::run(int(m), vectors,
                {operand + r * stride, stride, Gemm::kStepK, dir.hidden_panels + column * g_padded,
                 steps, zeros, 0, sums, next_panel.part(steps)});
    }
  }

  // What follows from a group's products, row by row.
  void cells_step(int d, const Step& step, const Range& rows, const Group& group,
                  const A* sums) const {
    const int64_t end = end_of(args[d], step, rows);
    for (int64_t b = rows.begin; b < end; ++b)
      for (unsigned left = group.blocks; left; left &= left - 1) {
        const int place = __builtin_ctz(left);
        row_step(d, step, b, group.first + place,
                 sums + (place * group_rows + b - rows.begin) * kWidth);
      }
  }

  void row_step(int d, const Step& step, int64_t b, int64_t block, const A* sums) const {
    const Backward& a = args[d];
    const int64_t column = hidden.first(block);
    Vec<A> tanh_c[kMaxVectors];
    if (!seq.projected && b < step.active) tanh_cells(a, step, b, column, tanh_c);
    for (int v = 0; v < hidden.vectors_of(block); ++v) {
      const int64_t u = column + v * V;
      const int lanes = lanes_at<A>(u, seq.P);
      if (lanes == V) {
        hidden_gradient<true>(a, direction[d], step, b, u, lanes, sums + v * V, tanh_c[v]);
      } else {
        hidden_gradient<false>(a, direction[d], step, b, u, lanes, sums + v * V, tanh_c[v]);
      }
    }
  }

  // tanh(c_t) of row b from unit u on, a tile's width of it.
  void tanh_cells(const Backward& a, const Step& step, int64_t b, int64_t u, Vec<A>* tanh_c) const {
    const T* cells = static_cast<const T*>(a.cells) + (seq.first_row(step.t) + b) * seq.H;
    for (int v = 0; v < kMaxVectors; ++v) {
      const int64_t left = seq.H - u - v * V;
      tanh_c[v] = left >= V  ? load(cells + u + v * V)
                  : left > 0 ? load_part(cells + u + v * V, int(left))
                             : Vec<A>{};
    }
    tanh_each<A, kMaxVectors>(tanh_c);
  }

  template <bool whole>
  void hidden_gradient(const Backward& a, const Direction& dir, const Step& step, int64_t b,
                       int64_t u, int lanes, const A* sums, Vec<A> tanh_c) const {
    Vec<A> dh{};
    if (b < step.before) {
      dh = load(sums);
    } else if (a.grad_h_n) {
      dh = load_lanes<T, whole>(static_cast<const T*>(a.grad_h_n) + b * seq.P + u, lanes);
    }
    if (b >= step.active) {
      store_lanes<whole>(static_cast<T*>(a.grad_h_0) + b * seq.P + u, dh, lanes);
      return;
    }
    if (a.grad_output) {
      const int64_t row = seq.offset(step.t, b, a.grad_output_stride_t, a.grad_output_stride_b);
      dh += load_lanes<T, whole>(static_cast<const T*>(a.grad_output) + row + u, lanes);
    }
    if (seq.projected) {
      T* projected = static_cast<T*>(a.grad_projected) + (seq.first_row(step.t) + b) * seq.P + u;
      store_lanes<whole>(projected, dh, lanes);
      store_lanes<whole>(dir.dh + b * p_stride + u, dh, lanes);
    } else {
      cell<whole>(a, dir, step, b, u, lanes, dh, tanh_c);
    }
  }

  void projection_step(int d, int64_t block, const Step& step, const Range& rows, A* sums) const {
    const Direction& dir = direction[d];
    static const A zeros[kWidth] = {};
    const int vectors = units.vectors_of(block);
    const int64_t column = units.first(block);
    const int64_t end = step.active < rows.end ? step.active : rows.end;
    for (int64_t r = rows.begin, m; r < end; r += m) {
      m = Gemm::next_rows(end - r, vectors);
      Gemm::run(
          int(m), vectors,
          {dir.dh + r * p_stride, p_stride, Gemm::kStepK, dir.projection_panels + column * p_padded,
           p_padded / Gemm::kStepK, zeros, 0, sums});
      for (int i = 0; i < m; ++i) {
        Vec<A> tanh_c[kMaxVectors];
        tanh_cells(args[d], step, r + i, column, tanh_c);
        for (int v = 0; v < vectors; ++v) {
          const int64_t u = column + v * V;
          cell<false>(args[d], dir, step, r + i, u, lanes_at<A>(u, seq.H),
                      load(sums + i * kWidth + v * V), tanh_c[v]);
        }
      }
    }
  }

  template <bool whole>
  void cell(const Backward& a, const Direction& dir, const Step& step, int64_t b, int64_t u,
            int lanes, Vec<A> dh, Vec<A> tc) const {
    const int64_t row = seq.first_row(step.t) + b, H = seq.H;
    const T* gates = static_cast<const T*>(a.gates) + row * 4 * H + u;
    const Vec<A> i = load_lanes<T, whole>(gates, lanes), f = load_lanes<T, whole>(gates + H, lanes);
    const Vec<A> g = load_lanes<T, whole>(gates + 2 * H, lanes),
                 o = load_lanes<T, whole>(gates + 3 * H, lanes);
    const T* cells = static_cast<const T*>(a.cells) + u;
    const T* previous = b < step.continued ? cells + (step.first_cell + b) * H
                                           : static_cast<const T*>(a.c_0) + b * H + u;
    const Vec<A> c_before = load_lanes<T, whole>(previous, lanes);
    A* state = dir.dc + b * c_stride + u;
    const Vec<A> one = splat(A(1));
    const Vec<A> dc = load(state) + dh * o * (one - tc * tc);
    store(state, dc * f);
    const Vec<A> di = dc * g * i * (one - i), df = dc * c_before * f * (one - f);
    const Vec<A> dg = dc * i * (one - g * g), do_ = dh * tc * o * (one - o);
    T* dgates = static_cast<T*>(a.dgates) + row * 4 * H + u;
    store_lanes<whole>(dgates, di, lanes);
    store_lanes<whole>(dgates + H, df, lanes);
    store_lanes<whole>(dgates + 2 * H, dg, lanes);
    store_lanes<whole>(dgates + 3 * H, do_, lanes);
    if (copy_dgates) {
      Elem* operand = dir.dgates[(step.s + 1) % 2] + b * g_stride + u;
      store_lanes<whole>(operand, di, lanes);
      store_lanes<whole>(operand + H, df, lanes);
      store_lanes<whole>(operand + 2 * H, dg, lanes);
      store_lanes<whole>(operand + 3 * H, do_, lanes);
    }
    if (a.hidden) store_lanes<whole>(static_cast<T*>(a.hidden) + row * H + u, o * tc, lanes);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
