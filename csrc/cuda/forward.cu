// The forward pass, all steps in one launch, for one kind of operands (FUSED_LSTM_OPERANDS).
//
//   gates = (x W_ih^T)_t + b_ih + b_hh + h_{t-1} W_hh^T;  c_t, h_t as in ../lstm.h
//
// A block has `units` hidden units, all four gates of them, and multiplies tile_rows rows of the
// batch at a time: each warp a share of the columns of W_hh (teams) or of the units (alone), with
// its weights in registers, and in shared memory what does not fit there. The partial sums meet in
// shared memory; one thread then updates one cell (two when alone), whose c stays in shared memory
// from step to step in fp32. h goes to `output`, and for the next step
//   alone: into shared memory, and a block barrier follows;
//   team:  into `states` in global memory, which is filled with kNotYet before the launch: the
//   words
//          themselves say that they are there, and no block waits for more than the words that its
//          lanes multiply. Row b of `states` is h_0, row B + r the h of packed row r, so that no
//          word is written twice.
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial
// sums][c][alone: h, two copies of each tile (tiles, 2, tile_rows, state_stride); kF32 teams: a
// stage of each warp].
#include "cell.cuh"
#include "product.cuh"

namespace fused_lstm::cuda {
namespace {

// Where the four gates of unit 8 mu + u of row n lie among a block's partial sums, in Words: in the
// order in which mma leaves them (n / 2 in q), turned so that neither the lanes that write (u, q)
// nor those that read (u, n) meet in a bank.
template <int NT>
FUSED_LSTM_DEVICE int partial_sum_of(int mu, int u, int n) {
  return ((mu * NT + n / 8) * 2 + n % 2) * 32 + u * 4 + (n % 8 / 2 ^ u / 2);
}

// A thread's cells: one unit, and the same rows of each tile. Alone, they are among those that the
// thread's own warp multiplies.
template <bool kAlone, int NT>
struct Cells {
  int mu, u;  // the block's unit 8 mu + u
  int row;    // of the tile; alone the fourth from there too
  int unit;   // of all
  bool mine;  // the same for all lanes of a warp
  bool real;

  FUSED_LSTM_DEVICE Cells(int thread, int slice, int units, int H)
      : mu(kAlone ? thread / kLanes : thread / 8 / (8 * NT)),
        u(thread % 8),
        row(kAlone ? thread % kLanes / 8 : thread / 8 % (8 * NT)),
        unit(slice * units + 8 * mu + u),
        mine(8 * mu < units),
        real(mine && unit < H) {}
};

// The sums for one cell's gates: what it is given, and the warps' partial sums, `copy` Words apart.
template <int kWarps>
FUSED_LSTM_DEVICE void gather(float (&sum)[4], const Words* partials, int copy) {
  Words partial[kWarps];
#pragma unroll
  for (int k = 0; k < kWarps; ++k) partial[k] = load_words(partials + k * copy);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    float part[kWarps];
#pragma unroll
    for (int k = 0; k < kWarps; ++k) part[k] = bits_float(partial[k].word[gate]);
    sum[gate] += sum_of(part);
  }
}

// To the blocks of a team: h as it is multiplied, `word`, of one unit; `within` its row of states.
template <class T>
FUSED_LSTM_DEVICE void publish_state(char* row, int unit, uint32_t word, bool within) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = word | shuffle_xor(word, 1) << 16;  // the next unit's beside it
    if (within && unit % 2 == 0) publish(row + unit * int(sizeof(T)), pair);
  } else {
    if (within) publish(row + unit * int(sizeof(T)), word);
  }
}

// Into L2, some steps ahead: x W_ih^T of this block's units, which a long sequence has long pushed
// out to memory, and the words that the block will publish, for the fill has been pushed out too
// and who polls a word would wait for memory.
template <class T, bool kAlone>
FUSED_LSTM_DEVICE void prefetch_cell(const ForwardParams& params, const ForwardTask& task,
                                     const Rows& then, int b, int unit) {
  if (b >= then.count) return;
  const int H = params.extent.H, r = then.first + b;
  const T* const gates = row_of(static_cast<const T*>(task.given.gates), r, 4 * H) + unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) prefetch(gates + gate * H);
  if (!kAlone)
    prefetch(row_of(task.states, params.extent.B + r, params.states_stride) +
             unit * int(sizeof(T)));
}

// What the step gives away of row r: the output, and for the backward gates and cells.
template <class S>
FUSED_LSTM_DEVICE void save(const ForwardDirection& to, bool gates_too, int r, int H, int unit,
                            const Cell<float>& cell) {
  using T = typename S::Type;
  store_element(row_of(static_cast<T*>(to.output), r, to.output_stride) + unit, S::store(cell.h));
  if (!gates_too) return;
  T* const gates = row_of(static_cast<T*>(to.gates), r, 4 * H) + unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) store_element(gates + gate * H, S::store(cell.gate[gate]));
  store_element(row_of(static_cast<T*>(to.cells), r, H) + unit, S::store(cell.c));
}

template <Operands kOperands, bool kAlone, int NT>
FUSED_LSTM_KERNEL(256)
forward_kernel(FUSED_LSTM_PARAMS(ForwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Operand = typename S::Operand;
  constexpr int MT = kAlone ? 2 : 4;  // gates i, f and g, o of 8 units are two tiles of 16 rows
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kAlone ? 2 : 1;  // of a thread
  constexpr bool kFast = sizeof(T) == 2;
  // Half of the threads have cells, the others serve them (plan.h).
  constexpr bool kServed = !kAlone && NT == 1;
  const Tiling& tiling = params.tiling;
  const Extent& extent = params.extent;
  const Place place(tiling);
  const int slice = kAlone ? 0 : place.slice;
  const ForwardDirection& given = params.direction[place.direction].given;
  const int H = extent.H, thread = thread_index(), lane = thread % kLanes;
  const int warp = thread / kLanes;  // alone, of the units; in a team, of the columns
  const int units = kAlone ? tiling.warps_m * 8 : kUnitsInTeam;
  char* const shared = shared_memory();
  const int cells = units * kRows / kCells;  // threads that have cells
  float* const cell = reinterpret_cast<float*>(shared + tiling.cell);
  Words* const biases = reinterpret_cast<Words*>(shared + tiling.bias);
  char* const states = shared + tiling.states;  // alone
  const int states_copy = kRows * tiling.state_stride;

  Weights<MT, kRegisterChunks<kForward, kAlone, kOperands>> weights;
  weights.load(params.direction[place.direction].weights, tiling, shared);

  const bool serves = kServed && thread >= cells;
  // Of a thread that serves, those of the one that it serves.
  const Cells<kAlone, NT> own(kServed ? thread % cells : thread, slice, units, H);
  const bool owner = own.mine && !serves;
  for (int k = thread; k < units; k += thread_count()) {
    const int at = slice * units + k;
    Words bias{};
    if (given.bias_ih && at < H) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        bias.word[gate] = float_bits(S::load(static_cast<const T*>(given.bias_ih)[gate * H + at]) +
                                     S::load(static_cast<const T*>(given.bias_hh)[gate * H + at]));
    }
    store_words(biases + k, bias);
  }
  for (int tile = 0; owner && tile < tiling.tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = (tile * tiling.groups + place.group) * kRows + own.row + 4 * i;
      store_element(cell + (tile * kCells + i) * cells + thread,
                    own.real && b < extent.B
                        ? S::load(static_cast<const T*>(given.c_0)[int64_t(b) * H + own.unit])
                        : 0);
    }
  }
  if (kAlone) {
    // h_0 in both copies: rows of a reversed packed sequence may start at any step.
    const int columns = tiling.state_stride / int(sizeof(T));
    for (int at = thread; at < tiling.tiles * 2 * kRows * columns; at += thread_count()) {
      const int column = at % columns, n = at / columns % kRows, tile = at / columns / kRows / 2;
      const int b = (tile * tiling.groups + place.group) * kRows + n;
      const float h = column < H && b < extent.B
                          ? S::load(static_cast<const T*>(given.h_0)[int64_t(b) * H + column])
                          : 0;
      char* const row = states + at / columns * tiling.state_stride;
      store_element(reinterpret_cast<Operand*>(row + turned<kOperands>(n, column * int(sizeof(T)))),
                    Operand(operand<kOperands>(h)));
    }
  }
  block_barrier();

  // Everything of a step that others don't wait for is done while what they publish is on its way:
  // x is loaded, the step before saved, and L2 asked for what comes. Behind the publication it took
  // 1,100 cycles of a step's 2,900, before the first look at what the others had published.
  using Source =
      std::conditional_t<kAlone, SharedStates<kOperands, NT>, PublishedStates<kOperands, MT, NT>>;
  Source source;
  Words state[Source::kAhead][NT];
  constexpr int kColumns = kChunkBytes / int(sizeof(T));
  const int column = warp * tiling.chunks * kColumns + lane % 4 * (kColumns / 4);
  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, given.reverse);
  if constexpr (!kAlone) {
    source.all = params.direction[place.direction].states;
    source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
  }
  // To the next tile; what it multiplies sets out, if it has to.
  struct Aim {
    int rows[NT], limits[NT];
  };
  const auto aim = [&] {
    Aim aim{};
    if constexpr (!kAlone) {
      const Turn& turn = walk.turn();
      const int within = (tiling.columns - column + kColumns - 1) / kColumns;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int b = turn.row_0 + 8 * nt + lane / 4;
        const int from = b < turn.before.count ? extent.B + turn.before.first + b : b;
        aim.rows[nt] = from * (params.states_stride / 16) + column * int(sizeof(T)) / 16;
        aim.limits[nt] = b < turn.now.count ? smaller(within, weights.chunks) : 0;
      }
    }
    return aim;
  };
  const auto fetch = [&](const Aim& aim) {
    if constexpr (!kAlone) {
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        source.rows[nt] = aim.rows[nt];
        source.limits[nt] = aim.limits[nt];
      }
      source.fetch(0, weights.chunks, state);
    }
  };

  using X = T[kCells][4];  // x W_ih^T of this thread's cells
  const auto load_x = [&](const Turn& turn, X& x) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = turn.row_0 + own.row + 4 * i;
      if (!own.real || b >= turn.now.count) continue;
      const ForwardDirection& from = params.direction[opaque(place.direction)].given;
      const T* gates = row_of(static_cast<const T*>(from.gates), turn.now.first + b, 4 * H);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) x[i][gate] = load_element(gates + gate * H + own.unit);
    }
  };

  const auto save_cell = [&](int r, const Cell<float>& of) {
    save<S>(params.direction[opaque(place.direction)].given, params.save, r, H, own.unit, of);
  };

  // One unit of eight does it for all of them: their cells lie in the same sectors.
  const auto prefetch_cells = [&](const ForwardTask& task, const Turn& turn) {
    if (!own.real || own.u) return;
    const Rows then = walk.rows(turn.s + kStepsPrefetched);
#pragma unroll
    for (int i = 0; i < kCells; ++i)
      prefetch_cell<T, kAlone>(params, task, then, turn.row_0 + own.row + 4 * i, own.unit);
  };

  // What the halves of the block hand each other, each cell's.
  Words* const handed_sums = reinterpret_cast<Words*>(shared + tiling.handed);  // (2, cells)
  Words* const handed_cells = handed_sums + 2 * cells;                          // (2, 2, cells)
  const auto begin_sums = [&](const X& x, const Turn& turn, int i, float (&sum)[4]) {
    const Words bias = load_words(biases + 8 * own.mu + own.u);
    const bool active = own.real && turn.row_0 + own.row + 4 * i < turn.now.count;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      sum[gate] = bits_float(bias.word[gate]) + (active ? S::load(x[i][gate]) : 0);
  };
  const auto hand_sums = [&](const X& x, const Turn& turn, int copy) {
    float sum[4];
    begin_sums(x, turn, 0, sum);
    store_words(handed_sums + copy * cells + thread % cells,
                {{float_bits(sum[0]), float_bits(sum[1]), float_bits(sum[2]), float_bits(sum[3])}});
  };
  const auto hand_cell = [&](const Cell<float>& of, int copy) {
    Words* const to = handed_cells + 2 * copy * cells + thread;
    store_words(to, {{float_bits(of.gate[0]), float_bits(of.gate[1]), float_bits(of.gate[2]),
                      float_bits(of.gate[3])}});
    store_words(to + cells, {{float_bits(of.c), float_bits(of.h), 0, 0}});
  };
  const auto take_cell = [&](int copy) {
    const Words* const from = handed_cells + 2 * copy * cells + thread % cells;
    const Words gates = load_words(from), rest = load_words(from + cells);
    Cell<float> of;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) of.gate[gate] = bits_float(gates.word[gate]);
    of.c = bits_float(rest.word[0]);
    of.h = bits_float(rest.word[1]);
    return of;
  };

  bool more = walk.next();
  const bool early = !kAlone && tiling.tiles > 1, late = !kAlone && !early;
  if (more && early) fetch(aim());
  if (more && serves) {
    X x;
    load_x(walk.turn(), x);
    hand_sums(x, walk.turn(), 0);
  }
  int unsaved = -1;  // the row whose cell the other half has handed over
  for (int copy = 0; more; copy ^= 1) {
    const Turn turn = walk.turn();
    const ForwardTask& task = params.direction[opaque(place.direction)];
    const ForwardDirection& given = task.given;
    X x;
    if (!kServed && owner) load_x(turn, x);
    if (!kServed) prefetch_cells(task, turn);
    const Aim here = aim();
    more = walk.next();
    if (late) fetch(here);
    if (serves) prefetch_cells(task, turn);
    if constexpr (kAlone) {
      source.rows = states + (2 * turn.tile + (turn.s & 1)) * states_copy;
      source.stride = tiling.state_stride;
      source.fetch(0, weights.chunks, state);
    }
    Sums<kOperands, MT, NT, 1> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    // With several tiles, what the next one multiplies was published long ago: it comes during the
    // cells. With one, it can't be there before this block has published its own.
    if (early && more) fetch(aim());

    // A team takes turns between two copies: what is read here is written again only after the
    // barrier of the next tile, which no thread reaches before it has read.
    const int all = units * kRows;  // Words
    Words* const partials = reinterpret_cast<Words*>(shared + tiling.partials) +
                            (kAlone ? 0 : copy * kWarpsInTeam * all);

    sums.each_unit([&](int mu, int u, int n, const Words& gates) {
      store_words(
          partials + (kAlone ? 0 : warp * all) + partial_sum_of<NT>((kAlone ? warp : 0) + mu, u, n),
          gates);
    });
    if (kAlone)
      warp_barrier();
    else
      block_barrier();

    // In tf32 the same again: they would take registers that the product needs.
    const int of = kServed && kOperands == kTf32 ? opaque(thread) : thread;
    const Cells<kAlone, NT> own(kServed ? of % cells : of, slice, units, H);
    if (owner) {
      Cell<float> found[kCells];
      // All cells first, without a branch: their latencies overlap.
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        float sum[4];
        if constexpr (kServed) {
          const Words begun = load_words(handed_sums + copy * cells + thread);
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[gate] = bits_float(begun.word[gate]);
        } else {
          begin_sums(x, turn, i, sum);
        }
        gather<(kAlone ? 1 : kWarpsInTeam)>(
            sum, partials + partial_sum_of<NT>(own.mu, own.u, own.row + 4 * i), all);
        const float c = load_element(cell + (turn.tile * kCells + i) * cells + thread);
        found[i] = update_cell<kFast>(sum, c);
        if (!own.real) found[i].h = 0;
      }
      // First what others wait for.
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int n = own.row + 4 * i, b = turn.row_0 + n;
        const uint32_t word = operand<kOperands>(found[i].h);
        if constexpr (kAlone) {
          char* next = states + (2 * turn.tile + (~turn.s & 1)) * states_copy;
          if (own.real && b < turn.now.count)
            store_element(
                reinterpret_cast<Operand*>(next + n * tiling.state_stride +
                                           turned<kOperands>(n, own.unit * int(sizeof(T)))),
                Operand(word));
        } else {
          char* const row =
              row_of(task.states, extent.B + turn.now.first + b, params.states_stride);
          // Columns beyond H, up to the row's end, are read too.
          publish_state<T>(row, own.unit, word,
                           b < turn.now.count && own.unit * int(sizeof(T)) < params.states_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int b = turn.row_0 + own.row + 4 * i;
        if (!own.real || b >= turn.now.count) continue;
        store_element(cell + (turn.tile * kCells + i) * cells + thread, found[i].c);
        if (b >= turn.after.count) {  // the row's last step
          static_cast<T*>(given.h_n)[int64_t(b) * H + own.unit] = S::store(found[i].h);
          static_cast<T*>(given.c_n)[int64_t(b) * H + own.unit] = S::store(found[i].c);
        }
        if (kServed && more)
          hand_cell(found[i], copy);
        else
          save_cell(turn.now.first + b, found[i]);
      }
    } else if (serves) {
      // What these threads' cells found in the tile before, and what they begin the next one with.
      X next;
      if (more) load_x(walk.turn(), next);
      if (unsaved >= 0) save_cell(unsaved, take_cell(copy ^ 1));
      const int b = turn.row_0 + own.row;
      unsaved = own.real && b < turn.now.count ? turn.now.first + b : -1;
      if (more) hand_sums(next, walk.turn(), copy ^ 1);
    }
    if (kAlone) block_barrier();  // h is written
  }
}

using Kernel = void (*)(ForwardParams);

template <Operands kOperands>
Kernel kernel_for(const Plan& plan) {
  if (plan.alone) return forward_kernel<kOperands, true, 1>;
  if constexpr (kOperands != kF32)  // whose sums would take all the registers
    if (plan.tile_rows == 16) return forward_kernel<kOperands, false, 2>;
  return forward_kernel<kOperands, false, 1>;
}

}  // namespace

template <>
int resident_forward<FUSED_LSTM_OPERANDS>(const Plan& plan) {
  return resident_blocks(kernel_for<FUSED_LSTM_OPERANDS>(plan), grid_of(plan));
}

template <>
const char* launch_forward<FUSED_LSTM_OPERANDS>(const Plan& plan, const ForwardParams& params,
                                                Stream stream) {
  return launch(kernel_for<FUSED_LSTM_OPERANDS>(plan), grid_of(plan), stream, params);
}

}  // namespace fused_lstm::cuda
