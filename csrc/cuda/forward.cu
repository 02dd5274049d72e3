// The forward pass, all steps in one launch, for one kind of operands (FUSED_LSTM_OPERANDS).
//
//   gates = (x W_ih^T)_t + b_ih + b_hh + h_{t-1} W_hh^T;  c_t, h_t as in ../lstm.h
//
// A block has 16 hidden units, all four gates of them, and multiplies tile_rows rows of the batch
// at a time: each warp a share of the columns of W_hh, with its weights in registers, and in shared
// memory what does not fit there. The partial sums meet in shared memory; one thread then updates
// one cell, whose c stays in shared memory from step to step in fp32. h goes to `output`, and for
// the next step into `states` in global memory, which is filled with kNotYet before the launch: the
// words themselves say that they are there, and no block waits for more than the words that its
// lanes multiply. Row b of `states` is h_0, row B + r the h of packed row r, so that no word is
// written twice.
//
// With tiles of 8 rows half of the threads have cells, and the other half serves them: it loads x,
// hands over what the sums begin with, and saves what the cells found. One thread's instructions
// follow each other at some 7 cycles each, and others wait for those between the last product and
// the publication, and between that and the next look at what others have published.
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial sums, two
// copies][biases][c][handed between the halves, two copies][kF32: a stage of each warp].
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

// Adds the warps' partial sums for one cell's gates, `copy` Words apart.
FUSED_LSTM_DEVICE void gather(float (&sum)[4], const Words* partials, int copy) {
  Words partial[kWarpsInTeam];
#pragma unroll
  for (int k = 0; k < kWarpsInTeam; ++k) partial[k] = load_words(partials + k * copy);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    float part[kWarpsInTeam];
#pragma unroll
    for (int k = 0; k < kWarpsInTeam; ++k) part[k] = bits_float(partial[k].word[gate]);
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
template <class T>
FUSED_LSTM_DEVICE void prefetch_cell(const ForwardParams& params, const ForwardTask& task,
                                     const RowRun& then, int b, int unit) {
  if (b >= then.count) return;
  const int H = params.extent.H, r = then.first + b;
  const T* const gates = row_of(static_cast<const T*>(task.given.gates), r, 4 * H) + unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) prefetch(gates + gate * H);
  prefetch(row_of(task.states, params.extent.B + r, params.states_stride) + unit * int(sizeof(T)));
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

// What the halves of a block hand each other through shared memory, each cell's.
struct Handed {
  Words* sums;   // (2, cells)
  Words* found;  // (2, 2, cells)
  int cells, cell;

  FUSED_LSTM_DEVICE Handed(char* at, int cells, int cell)
      : sums(reinterpret_cast<Words*>(at)), found(sums + 2 * cells), cells(cells), cell(cell) {}

  FUSED_LSTM_DEVICE void put(int copy, const float (&sum)[4]) const {
    store_words(sums + copy * cells + cell, words_of(sum));
  }
  FUSED_LSTM_DEVICE void take(int copy, float (&sum)[4]) const {
    floats_of(load_words(sums + copy * cells + cell), sum);
  }
  FUSED_LSTM_DEVICE void put(int copy, const Cell<float>& of) const {
    Words* const to = found + 2 * copy * cells + cell;
    store_words(to, words_of(of.gate));
    store_words(to + cells, {{float_bits(of.c), float_bits(of.h), 0, 0}});
  }
  FUSED_LSTM_DEVICE void take(int copy, Cell<float>& of) const {
    const Words* const from = found + 2 * copy * cells + cell;
    floats_of(load_words(from), of.gate);
    const Words rest = load_words(from + cells);
    of.c = bits_float(rest.word[0]);
    of.h = bits_float(rest.word[1]);
  }
};

template <Operands kOperands, int NT>
FUSED_LSTM_KERNEL(32 * kWarpsInTeam)
forward_kernel(FUSED_LSTM_PARAMS(ForwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  constexpr int MT = 4;  // gates i, f and g, o of 8 units are two tiles of 16 rows
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kUnitsInTeam * kRows;  // and as many threads that have one
  constexpr bool kServed = kIsServed<kRows>;
  constexpr bool kFast = sizeof(T) == 2;
  const Tiling& tiling = params.tiling;
  const Extent& extent = params.extent;
  const Place place(tiling);
  const int slice = place.slice, H = extent.H;
  const int thread = thread_index(), lane = thread % kLanes, warp = thread / kLanes;
  char* const shared = shared_memory();
  float* const cell = reinterpret_cast<float*>(shared + tiling.cell);
  Words* const biases = reinterpret_cast<Words*>(shared + tiling.bias);

  Weights<MT, kRegisterChunks<kForward, kOperands>> weights;
  weights.load(params.direction[place.direction].weights, tiling, shared);

  const bool owner = thread < kCells;  // the others serve
  // Of a thread that serves, the place of the one that it serves.
  const CellPlace<NT> own(thread % kCells, slice, H);
  const Handed handed(shared + tiling.handed, kCells, thread % kCells);
  const ForwardDirection& given = params.direction[place.direction].given;
  if (thread < kUnitsInTeam) {
    const int at = slice * kUnitsInTeam + thread;
    float bias[4] = {};
    if (given.bias_ih && at < H) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        bias[gate] = S::load(static_cast<const T*>(given.bias_ih)[gate * H + at]) +
                     S::load(static_cast<const T*>(given.bias_hh)[gate * H + at]);
    }
    store_words(biases + thread, words_of(bias));
  }
  for (int tile = 0; owner && tile < tiling.tiles; ++tile) {
    const int b = (tile * tiling.groups + place.group) * kRows + own.row;
    const bool here = own.real && b < extent.B;
    store_element(cell + tile * kCells + thread,
                  here ? S::load(row_of(static_cast<const T*>(given.c_0), b, H)[own.unit]) : 0);
  }
  block_barrier();

  PublishedStates<kOperands, MT, NT> source;
  Words state[source.kAhead][NT];
  constexpr int kColumns = kChunkBytes / int(sizeof(T));
  const int column = warp * tiling.chunks * kColumns + lane % 4 * (kColumns / 4);
  source.all = params.direction[place.direction].states;
  source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, given.reverse);
  const auto aim = [&] {
    const Turn& turn = walk.turn();
    const int within = (tiling.columns - column + kColumns - 1) / kColumns;
    Aim<NT> aim;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int b = turn.row_0 + 8 * nt + lane / 4;
      const int from = b < turn.before.count ? extent.B + turn.before.first + b : b;
      aim.rows[nt] = from * (params.states_stride / 16) + column * int(sizeof(T)) / 16;
      aim.limits[nt] = b < turn.now.count ? smaller(within, weights.chunks) : 0;
    }
    return aim;
  };

  using X = T[4];  // x W_ih^T of this thread's cell
  const auto load_x = [&](const Turn& turn, X& x) {
    const int b = turn.row_0 + own.row;
    if (!own.real || b >= turn.now.count) return;
    const ForwardDirection& from = params.direction[opaque(place.direction)].given;
    const T* gates = row_of(static_cast<const T*>(from.gates), turn.now.first + b, 4 * H);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) x[gate] = load_element(gates + gate * H + own.unit);
  };
  const auto begin_sums = [&](const X& x, const Turn& turn, float (&sum)[4]) {
    floats_of(load_words(biases + 8 * own.mu + own.u), sum);
    const bool active = own.real && turn.row_0 + own.row < turn.now.count;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) sum[gate] += active ? S::load(x[gate]) : 0;
  };
  const auto hand_sums = [&](const X& x, const Turn& turn, int copy) {
    float sum[4];
    begin_sums(x, turn, sum);
    handed.put(copy, sum);
  };
  const auto save_cell = [&](int r, const Cell<float>& of) {
    save<S>(params.direction[opaque(place.direction)].given, params.save, r, H, own.unit, of);
  };

  bool more = walk.next();
  const bool early = tiling.tiles > 1;
  if (more && early) source.set_out(aim(), weights.chunks, state);
  if (more && !owner) {
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
    if (!kServed) load_x(turn, x);
    const Aim<NT> here = aim();
    more = walk.next();
    if (!early) source.set_out(here, weights.chunks, state);
    // One unit of eight does it for all of them: their cells lie in the same sectors.
    if ((!kServed || !owner) && own.real && own.u == 0)
      prefetch_cell<T>(params, task, walk.rows(turn.s + kStepsPrefetched), turn.row_0 + own.row,
                       own.unit);
    Sums<kOperands, MT, NT, 1> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    // With several tiles, what the next one multiplies was published long ago: it comes during the
    // cells. With one, it can't be there before this block has published its own.
    if (early && more) source.set_out(aim(), weights.chunks, state);

    // Blocks take turns between two copies: what is read here is written again only after the
    // barrier of the next tile, which no thread reaches before it has read.
    constexpr int kAll = kUnitsInTeam * kRows;  // Words
    Words* const partials =
        reinterpret_cast<Words*>(shared + tiling.partials) + copy * kWarpsInTeam * kAll;
    sums.each_unit([&](int mu, int u, int n, const Words& gates) {
      store_words(partials + warp * kAll + partial_sum_of<NT>(mu, u, n), gates);
    });
    block_barrier();

    // The same again where it would take registers that the product needs.
    const int of = kServed == (kOperands == kTf32) ? opaque(thread) : thread;
    const CellPlace<NT> own(of % kCells, slice, H);
    const int b = turn.row_0 + own.row, r = turn.now.first + b;
    const bool in_step = b < turn.now.count;
    if (owner) {
      float sum[4];
      if (kServed)
        handed.take(copy, sum);
      else
        begin_sums(x, turn, sum);
      gather(sum, partials + partial_sum_of<NT>(own.mu, own.u, own.row), kAll);
      float* const c = cell + turn.tile * kCells + thread;
      Cell<float> found = update_cell<kFast>(sum, load_element(c));
      if (!own.real) found.h = 0;
      // First what others wait for. Columns beyond H, up to the row's end, are read too.
      publish_state<T>(row_of(task.states, extent.B + r, params.states_stride), own.unit,
                       operand<kOperands>(found.h),
                       in_step && own.unit * int(sizeof(T)) < params.states_stride);
      if (own.real && in_step) {
        store_element(c, found.c);
        if (b >= turn.after.count) {  // the row's last step
          row_of(static_cast<T*>(given.h_n), b, H)[own.unit] = S::store(found.h);
          row_of(static_cast<T*>(given.c_n), b, H)[own.unit] = S::store(found.c);
        }
        if (kServed && more)
          handed.put(copy, found);
        else
          save_cell(r, found);
      }
    } else {
      // What these threads' cells found in the tile before, and what they begin the next one with.
      X next;
      if (more) load_x(walk.turn(), next);
      if (unsaved >= 0) {
        Cell<float> found;
        handed.take(copy ^ 1, found);
        save_cell(unsaved, found);
      }
      unsaved = own.real && in_step ? r : -1;
      if (more) hand_sums(next, walk.turn(), copy ^ 1);
    }
  }
}

using Kernel = void (*)(ForwardParams);

template <Operands kOperands>
Kernel kernel_for(const Plan& plan) {
  if constexpr (kOperands != kF32)  // whose sums would take all the registers
    if (plan.tile_rows == 16) return forward_kernel<kOperands, 2>;
  return forward_kernel<kOperands, 1>;
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
