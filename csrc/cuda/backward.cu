// The backward pass through time, all steps in one launch, for one kind of operands
// (FUSED_LSTM_OPERANDS).
//
//   dh_t = grad_output_t + dgates_{t+1} W_hh;  dgates_t, dc_{t-1} from dh_t, dc_t and what was
//   saved
//
// The steps run against the direction's own order; "before" and "after" below mean this order. A
// block has 16 hidden units and multiplies with the columns of W_hh that belong to them, tile_rows
// rows of the batch at a time; the warps share the 4H gates that are summed over. Weights lie, and
// partial sums meet, as in forward.cu; dc stays in shared memory from step to step in fp32. dgates
// go to global memory, and that is what the blocks poll in the next step: it is filled with kNotYet
// before the launch, and nobody waits for more than the words that its lanes multiply. The products
// for dx, dW and db come after this, from dgates (host.cpp).
//
// All of a cell that does not wait for dh is computed before dh comes: with tiles of 8 rows by the
// half of the threads that has no cells, which hands it over (see forward.cu).
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial sums, two
// copies][dc][handed between the halves, two copies][kF32: a stage of each warp].
#include "cell.cuh"
#include "product.cuh"

namespace fused_lstm::cuda {
namespace {

// Where the sum for a unit of row n lies among a block's partial sums, in floats: in the order in
// which mma leaves them, turned so that neither the lanes that write nor those that read meet in a
// bank.
template <int NT>
FUSED_LSTM_DEVICE int partial_sum_of(int unit, int n) {
  const int place = (unit % 8 * 4 + n % 8 / 2) ^ (n % 2 * 2) ^ unit % 16 / 8;
  return ((unit / 16 * NT + n / 8) * 4 + unit % 16 / 8 * 2 + n % 2) * 32 + place;
}

// What one cell's gradient takes, loaded a tile ahead.
template <class T>
struct Saved {
  T gate[4], c, c_before, grad_output;  // c_before: of the direction's own step before
};

// The warps' sums for the same cell, `copy` floats apart.
FUSED_LSTM_DEVICE float gather(const float* partials, int copy) {
  float part[kWarpsInTeam];
#pragma unroll
  for (int k = 0; k < kWarpsInTeam; ++k) part[k] = load_element(partials + k * copy);
  return sum_of(part);
}

// The four gradients' words of one unit, as they are multiplied: to the blocks of a team. `to` is
// this unit's of gate 0; within: its row has this step, and the unit a place there.
template <class T>
FUSED_LSTM_DEVICE void publish_gradient(T* to, int unit, int padded, const uint32_t (&word)[4],
                                        bool within) {
  if constexpr (sizeof(T) == 2) {
    // Neighbours in unit share words: the even one publishes two gates of both, the odd one two.
    const bool odd = unit % 2;
    const uint32_t first = word[0] | word[1] << 16, second = word[2] | word[3] << 16;
    const uint32_t theirs = shuffle_xor(odd ? first : second, 1);
    const uint32_t low = odd ? theirs : first, high = odd ? second : theirs;
    if (!within) return;
    T* const pair = to - odd + (odd ? 2 * padded : 0);
    publish(pair, (low & 0xffff) | high << 16);
    publish(pair + padded, low >> 16 | (high & 0xffff0000u));
  } else {
    if (!within) return;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) publish(to + gate * padded, word[gate]);
  }
}

// The row of grad_output (T, B, H) that belongs to row b of the walk's step s.
FUSED_LSTM_DEVICE int64_t grad_output_row(const BackwardDirection& from, const Extent& extent,
                                          int s, const RowRun& step, int b) {
  if (extent.steps) return (int64_t(step.first) + b) * from.grad_output_stride_b;
  const int t = from.reverse ? s : extent.T - 1 - s;
  return t * from.grad_output_stride_t + b * from.grad_output_stride_b;
}

// Into L2, some steps ahead, what this block's cells will take from memory, and of a team the words
// that it will publish: see forward.cu. c is wanted a step earlier, as c_before.
template <class T>
FUSED_LSTM_DEVICE void prefetch_cell(const BackwardDirection& given, const Extent& extent, int step,
                                     const RowRun& then, int b, int unit, int padded) {
  if (b >= then.count) return;
  const int H = extent.H, r = then.first + b;
  const T* const gates = row_of(static_cast<const T*>(given.gates), r, 4 * H) + unit;
  const T* const dgates = row_of(static_cast<const T*>(given.dgates), r, 4 * padded) + unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    prefetch(gates + gate * H);
    prefetch(dgates + gate * padded);
  }
  prefetch(row_of(static_cast<const T*>(given.cells), r, H) + unit);
  if (given.grad_output)
    prefetch(static_cast<const T*>(given.grad_output) +
             grad_output_row(given, extent, step, then, b) + unit);
}

// What the halves of a block hand each other through shared memory, each cell's: its slopes, and
// what comes to dh from outside.
struct Handed {
  Words* all;  // (2, 2, cells)
  int cells, cell;

  FUSED_LSTM_DEVICE void put(int copy, const CellSlopes<float>& slopes, float dh) const {
    Words* const to = all + 2 * copy * cells + cell;
    store_words(to, words_of(slopes.gate));
    store_words(to + cells, {{float_bits(slopes.c), float_bits(slopes.forget), float_bits(dh), 0}});
  }
  FUSED_LSTM_DEVICE void take(int copy, CellSlopes<float>& slopes, float& dh) const {
    const Words* const from = all + 2 * copy * cells + cell;
    floats_of(load_words(from), slopes.gate);
    const Words rest = load_words(from + cells);
    slopes.c = bits_float(rest.word[0]);
    slopes.forget = bits_float(rest.word[1]);
    dh = bits_float(rest.word[2]);
  }
};

template <Operands kOperands, int NT>
FUSED_LSTM_KERNEL(32 * kWarpsInTeam)
backward_kernel(FUSED_LSTM_PARAMS(BackwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Operand = typename S::Operand;
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kUnitsInTeam * kRows;  // and as many threads that have one
  constexpr bool kServed = kIsServed<kRows>;
  constexpr bool kFast = sizeof(T) == 2;
  const Tiling& tiling = params.tiling;
  const Extent& extent = params.extent;
  const Place place(tiling);
  const BackwardDirection& given = params.direction[place.direction].given;
  const int H = extent.H, padded = tiling.padded;
  const int thread = thread_index(), lane = thread % kLanes, warp = thread / kLanes;
  char* const shared = shared_memory();
  float* const cell = reinterpret_cast<float*>(shared + tiling.cell);

  Weights<1, kRegisterChunks<kBackward, kOperands>> weights;
  weights.load(params.direction[place.direction].weights, tiling, shared);

  const bool owner = thread < kCells;
  // Of a thread that serves, the place of the one that it serves.
  const CellPlace<NT> own(thread % kCells, place.slice, H);
  const int row = own.row, unit = own.unit;
  const bool real = own.real;
  const Handed handed{reinterpret_cast<Words*>(shared + tiling.handed), kCells, thread % kCells};
  for (int tile = 0; owner && tile < tiling.tiles; ++tile) {
    const int b = (tile * tiling.groups + place.group) * kRows + row;
    const bool here = given.grad_c_n && real && b < extent.B;
    store_element(cell + tile * kCells + thread,
                  here ? S::load(row_of(static_cast<const T*>(given.grad_c_n), b, H)[unit]) : 0);
  }

  PublishedStates<kOperands, 1, NT> source;
  Words state[source.kAhead][NT];
  constexpr int kColumns = kChunkBytes / int(sizeof(T));
  const int column = warp * tiling.chunks * kColumns + lane % 4 * (kColumns / 4);
  source.all = static_cast<const char*>(given.dgates);
  source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, !given.reverse);
  const auto aim = [&] {
    const Turn& turn = walk.turn();
    const int within = (tiling.columns - column + kColumns - 1) / kColumns;
    const int row_words = 4 * padded * int(sizeof(T)) / 16;
    Aim<NT> aim;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int b = turn.row_0 + 8 * nt + lane / 4;
      aim.rows[nt] = (turn.before.first + b) * row_words + column * int(sizeof(T)) / 16;
      aim.limits[nt] =
          b < turn.before.count && b < turn.now.count ? smaller(within, weights.chunks) : 0;
    }
    return aim;
  };

  Saved<T> saved;
  const auto load_saved = [&](const Turn& turn) {
    const BackwardDirection& from = params.direction[opaque(place.direction)].given;
    const int b = turn.row_0 + row, r = turn.now.first + b;
    saved = {};
    if (!real || b >= turn.now.count) return;
    const T* const gates = row_of(static_cast<const T*>(from.gates), r, 4 * H) + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) saved.gate[gate] = load_element(gates + gate * H);
    const T* const all_c = static_cast<const T*>(from.cells) + unit;
    saved.c = load_element(row_of(all_c, r, H));
    saved.c_before = b < turn.after.count ? load_element(row_of(all_c, turn.after.first + b, H))
                                          : row_of(static_cast<const T*>(from.c_0), b, H)[unit];
    if (!from.grad_output) return;
    saved.grad_output = load_element(static_cast<const T*>(from.grad_output) +
                                     grad_output_row(from, extent, turn.s, turn.now, b) + unit);
  };
  CellSlopes<float> slopes = {};
  float dh_given = 0;
  const auto prepare = [&](const Turn& turn) {
    const BackwardDirection& from = params.direction[opaque(place.direction)].given;
    const int b = turn.row_0 + row;
    dh_given = from.grad_output ? S::load(saved.grad_output) : 0;
    if (from.grad_h_n && real && b < turn.now.count && b >= turn.before.count)
      dh_given += S::load(row_of(static_cast<const T*>(from.grad_h_n), b, H)[unit]);
    float gate[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) gate[k] = S::load(saved.gate[k]);
    slopes = cell_slopes<kFast>(gate, S::load(saved.c), S::load(saved.c_before));
  };

  bool more = walk.next();
  const bool early = tiling.tiles > 1;  // see forward.cu
  if (more && early) source.set_out(aim(), weights.chunks, state);
  if (more && !owner) load_saved(walk.turn());
  for (int copy = 0; more; copy ^= 1) {
    const Turn turn = walk.turn();
    const BackwardTask& task = params.direction[opaque(place.direction)];
    const BackwardDirection& given = task.given;
    const bool works = !kServed || !owner;
    if (!kServed) load_saved(turn);
    if (works) prepare(turn);
    if (kServed && !owner) handed.put(copy, slopes, dh_given);
    const Aim<NT> here = aim();
    more = walk.next();
    if (!early) source.set_out(here, weights.chunks, state);
    if (kServed && !owner && more) load_saved(walk.turn());
    // One unit of eight does it for all of them: their cells lie in the same sectors.
    if (works && real && own.u == 0)
      prefetch_cell<T>(given, extent, turn.s + kStepsPrefetched,
                       walk.rows(turn.s + kStepsPrefetched), turn.row_0 + row, unit, padded);
    Sums<kOperands, 1, NT, 4 / NT> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    if (early && more) source.set_out(aim(), weights.chunks, state);

    // Blocks take turns between two copies: see forward.cu.
    float* const partials =
        reinterpret_cast<float*>(shared + tiling.partials) + copy * kWarpsInTeam * kCells;
    sums.each([&](int, int m, int n, float sum) {
      store_element(partials + warp * kCells + partial_sum_of<NT>(m, n), sum);
    });
    block_barrier();

    if (owner) {
      if (kServed) handed.take(copy, slopes, dh_given);
      const int b = turn.row_0 + row, r = turn.now.first + b;
      const bool in_step = b < turn.now.count;
      const float dh =
          dh_given + gather(partials + partial_sum_of<NT>(8 * own.mu + own.u, row), kCells);
      float* const dc = cell + turn.tile * kCells + thread;
      CellGradient<float> found = cell_gradient(slopes, dh, load_element(dc));
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) word[k] = operand<kOperands>(real && in_step ? found.gate[k] : 0);
      // First what others wait for.
      publish_gradient(row_of(static_cast<Operand*>(given.dgates), r, 4 * padded) + unit, unit,
                       padded, word, in_step && unit < padded);
      if (real && in_step) {
        store_element(dc, found.dc_before);
        if (b >= turn.after.count)  // the row's last step, its first in the direction's order
          row_of(static_cast<T*>(given.grad_c_0), b, H)[unit] = S::store(found.dc_before);
      }
    }
  }
}

using Kernel = void (*)(BackwardParams);

template <Operands kOperands>
Kernel kernel_for(const Plan& plan) {
  if constexpr (kOperands != kF32)
    if (plan.tile_rows == 16) return backward_kernel<kOperands, 2>;
  return backward_kernel<kOperands, 1>;
}

}  // namespace

template <>
int resident_backward<FUSED_LSTM_OPERANDS>(const Plan& plan) {
  return resident_blocks(kernel_for<FUSED_LSTM_OPERANDS>(plan), grid_of(plan));
}

template <>
const char* launch_backward<FUSED_LSTM_OPERANDS>(const Plan& plan, const BackwardParams& params,
                                                 Stream stream) {
  return launch(kernel_for<FUSED_LSTM_OPERANDS>(plan), grid_of(plan), stream, params);
}

}  // namespace fused_lstm::cuda
