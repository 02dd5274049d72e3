// The backward pass through time, all steps in one launch, for one kind of operands
// (FUSED_LSTM_OPERANDS).
//
//   dh_t = grad_output_t + dgates_{t+1} W_hh;  dgates_t, dc_{t-1} from dh_t, dc_t and what was
//   saved
//
// The steps run against the direction's own order; "before" and "after" below mean this order. A
// block has `units` hidden units and multiplies with the columns of W_hh that belong to them,
// tile_rows rows of the batch at a time; the warps share the 4H gates that are summed over. Weights
// lie, and partial sums meet, as in forward.cu; dc stays in shared memory from step to step in
// fp32. dgates go to global memory, and from there, or from shared memory when alone, into the next
// step's product:
//   team: `dgates` itself is what blocks poll. It is filled with kNotYet before the launch; nobody
//         waits for more than the words that its lanes multiply.
// The products for dx, dW and db come after this, from dgates (host.cpp).
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial
// sums][dc][alone: dgates, two copies of each tile (tiles, 2, tile_rows, state_stride); kF32 teams:
// a stage of each warp].
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

// The warps' sums for the same cell, `copy` floats apart: kWarps of them, or (0) as many as
// `warps`.
template <int kWarps>
FUSED_LSTM_DEVICE float gather(const float* partials, int copy, int warps) {
  if constexpr (kWarps > 0) {
    float part[kWarps];
#pragma unroll
    for (int k = 0; k < kWarps; ++k) part[k] = load_element(partials + k * copy);
    return sum_of(part);
  }
  float sum = 0;
  for (int k = 0; k < warps; ++k) sum += load_element(partials + k * copy);
  return sum;
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
                                          int s, const Rows& step, int b) {
  if (extent.steps) return (int64_t(step.first) + b) * from.grad_output_stride_b;
  const int t = from.reverse ? s : extent.T - 1 - s;
  return t * from.grad_output_stride_t + b * from.grad_output_stride_b;
}

// Into L2, some steps ahead, what this block's cells will take from memory, and of a team the words
// that it will publish: see forward.cu. c is wanted a step earlier, as c_before.
template <class T, bool kAlone>
FUSED_LSTM_DEVICE void prefetch_cell(const BackwardDirection& given, const Extent& extent, int step,
                                     const Rows& then, int b, int unit, int padded) {
  if (b >= then.count) return;
  const int H = extent.H, r = then.first + b;
  const T* const gates = row_of(static_cast<const T*>(given.gates), r, 4 * H) + unit;
  const T* const dgates = row_of(static_cast<const T*>(given.dgates), r, 4 * padded) + unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    prefetch(gates + gate * H);
    if (!kAlone) prefetch(dgates + gate * padded);
  }
  prefetch(row_of(static_cast<const T*>(given.cells), r, H) + unit);
  if (given.grad_output)
    prefetch(static_cast<const T*>(given.grad_output) +
             grad_output_row(given, extent, step, then, b) + unit);
}

template <Operands kOperands, bool kAlone, int NT>
FUSED_LSTM_KERNEL(256)
backward_kernel(FUSED_LSTM_PARAMS(BackwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Operand = typename S::Operand;
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kAlone ? 2 : 1;  // of a thread
  constexpr bool kFast = sizeof(T) == 2;
  // Half of the threads have cells, the others serve them (plan.h).
  constexpr bool kServed = !kAlone && NT == 1;
  const Tiling& tiling = params.tiling;
  const Extent& extent = params.extent;
  const Place place(tiling);
  const int slice = kAlone ? 0 : place.slice;
  const BackwardDirection& given = params.direction[place.direction].given;
  const int H = extent.H, padded = tiling.padded;
  const int thread = thread_index(), lane = thread % kLanes, warp = thread / kLanes;
  const int warps_k = kAlone ? tiling.warps_k : kWarpsInTeam;
  const int warp_k = kAlone ? warp % warps_k : warp, warp_m = kAlone ? warp / warps_k : 0;
  const int units = kAlone ? tiling.warps_m * 16 : kUnitsInTeam;
  const int cells = units * kRows, owners = cells / kCells;  // the threads that have cells
  char* const shared = shared_memory();
  float* const cell = reinterpret_cast<float*>(shared + tiling.cell);
  char* const states = shared + tiling.states;  // alone
  const int states_copy = kRows * tiling.state_stride;

  Weights<1, kRegisterChunks<kBackward, kAlone, kOperands>> weights;
  weights.load(params.direction[place.direction].weights, tiling, shared);

  // This thread's cells: one unit, and the same rows of each tile. Of a thread that serves, those
  // of the one that it serves.
  const bool serves = kServed && thread >= owners;
  const int of = kServed ? thread % owners : thread;
  const int mu = kAlone ? warp : of / 8 / kRows, block_unit = 8 * mu + of % 8;
  const int row = kAlone ? lane / 8 : of / 8 % kRows;  // and the fourth from there
  const int unit = slice * units + block_unit;
  const bool mine = 8 * mu < units, real = mine && unit < H, owner = mine && !serves;
  for (int tile = 0; owner && tile < tiling.tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = (tile * tiling.groups + place.group) * kRows + row + 4 * i;
      store_element(cell + (tile * kCells + i) * owners + thread,
                    given.grad_c_n && real && b < extent.B
                        ? S::load(static_cast<const T*>(given.grad_c_n)[int64_t(b) * H + unit])
                        : 0);
    }
  }
  if (kAlone) {
    // Rows may start at any step: until then nothing comes to them from other steps.
    for (int at = thread; at < tiling.tiles * 2 * states_copy / int(sizeof(Words));
         at += thread_count())
      store_words(states + at * sizeof(Words), Words{});
    block_barrier();
  }

  // As in forward.cu: what does not wait for other blocks is done while their words are on the way.
  using Source =
      std::conditional_t<kAlone, SharedStates<kOperands, NT>, PublishedStates<kOperands, 1, NT>>;
  Source source;
  Words state[Source::kAhead][NT];
  constexpr int kColumns = kChunkBytes / int(sizeof(T));
  const int column = warp_k * tiling.chunks * kColumns + (kAlone ? 0 : lane % 4 * (kColumns / 4));
  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, !given.reverse);
  if constexpr (!kAlone) {
    source.all = static_cast<const char*>(given.dgates);
    source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
  }
  struct Aim {
    int rows[NT], limits[NT];
  };
  const auto aim = [&] {
    Aim aim{};
    if constexpr (!kAlone) {
      const Turn& turn = walk.turn();
      const int within = (tiling.columns - column + kColumns - 1) / kColumns;
      const int row_words = 4 * padded * int(sizeof(T)) / 16;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int b = turn.row_0 + 8 * nt + lane / 4;
        aim.rows[nt] = (turn.before.first + b) * row_words + column * int(sizeof(T)) / 16;
        aim.limits[nt] =
            b < turn.before.count && b < turn.now.count ? smaller(within, weights.chunks) : 0;
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

  // All of this thread's cells that does not wait for dh, and what comes to dh from outside.
  Saved<T> saved[kCells];
  const auto load_saved = [&](const Turn& turn) {
    const BackwardDirection& from = params.direction[opaque(place.direction)].given;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = turn.row_0 + row + 4 * i;
      saved[i] = {};
      if (!real || b >= turn.now.count) continue;
      const int r = turn.now.first + b;
      const T* gates = row_of(static_cast<const T*>(from.gates), r, 4 * H) + unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) saved[i].gate[gate] = load_element(gates + gate * H);
      const T* all_c = static_cast<const T*>(from.cells) + unit;
      saved[i].c = load_element(row_of(all_c, r, H));
      saved[i].c_before = b < turn.after.count
                              ? load_element(row_of(all_c, turn.after.first + b, H))
                              : row_of(static_cast<const T*>(from.c_0), b, H)[unit];
      if (!from.grad_output) continue;
      const int64_t at = grad_output_row(from, extent, turn.s, turn.now, b);
      saved[i].grad_output = load_element(static_cast<const T*>(from.grad_output) + at + unit);
    }
  };
  CellSlopes<float> slopes[kCells] = {};
  float dh_given[kCells] = {};
  const auto prepare = [&](const Turn& turn) {
    const BackwardDirection& from = params.direction[opaque(place.direction)].given;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = turn.row_0 + row + 4 * i;
      dh_given[i] = from.grad_output ? S::load(saved[i].grad_output) : 0;
      if (from.grad_h_n && real && b < turn.now.count && b >= turn.before.count)
        dh_given[i] += S::load(row_of(static_cast<const T*>(from.grad_h_n), b, H)[unit]);
      float gate[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) gate[k] = S::load(saved[i].gate[k]);
      slopes[i] = cell_slopes<kFast>(gate, S::load(saved[i].c), S::load(saved[i].c_before));
    }
  };
  // One unit of eight does it for all of them: their cells lie in the same sectors.
  const auto prefetch_cells = [&](const BackwardDirection& from, const Turn& turn) {
    if (!real || unit % 8) return;
    const int step = turn.s + kStepsPrefetched;
    const Rows then = walk.rows(step);
#pragma unroll
    for (int i = 0; i < kCells; ++i)
      prefetch_cell<T, kAlone>(from, extent, step, then, turn.row_0 + row + 4 * i, unit, padded);
  };
  Words* const handed = reinterpret_cast<Words*>(shared + tiling.handed);  // (2, 2, owners)
  const auto hand_over = [&](const Turn& turn, int copy) {
    prepare(turn);
    Words* const to = handed + 2 * copy * owners + of;
    const CellSlopes<float>& one = slopes[0];
    store_words(to, {{float_bits(one.gate[0]), float_bits(one.gate[1]), float_bits(one.gate[2]),
                      float_bits(one.gate[3])}});
    store_words(to + owners,
                {{float_bits(one.c), float_bits(one.forget), float_bits(dh_given[0]), 0}});
  };
  const auto take_over = [&](int copy) {
    const Words* const from = handed + 2 * copy * owners + of;
    const Words gates = load_words(from), rest = load_words(from + owners);
#pragma unroll
    for (int k = 0; k < 4; ++k) slopes[0].gate[k] = bits_float(gates.word[k]);
    slopes[0].c = bits_float(rest.word[0]);
    slopes[0].forget = bits_float(rest.word[1]);
    dh_given[0] = bits_float(rest.word[2]);
  };

  bool more = walk.next();
  const bool early = !kAlone && tiling.tiles > 1, late = !kAlone && !early;
  if (more && early) fetch(aim());
  if (more && serves) load_saved(walk.turn());
  for (int copy = 0; more; copy ^= 1) {
    const Turn turn = walk.turn();
    const BackwardTask& task = params.direction[opaque(place.direction)];
    const BackwardDirection& given = task.given;
    if (!kServed) {
      if (owner) load_saved(turn);
      prefetch_cells(given, turn);
      if (owner) prepare(turn);
    }
    if (serves) hand_over(turn, copy);
    const Aim here = aim();
    more = walk.next();
    if (late) fetch(here);
    if (serves) {
      if (more) load_saved(walk.turn());
      prefetch_cells(given, turn);
    }
    if constexpr (kAlone) {
      source.rows = states + (2 * turn.tile + (turn.s & 1)) * states_copy + column * int(sizeof(T));
      source.stride = tiling.state_stride;
      source.fetch(0, weights.chunks, state);
    }
    Sums<kOperands, 1, NT, (kAlone ? 1 : 4 / NT)> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    if (early && more) fetch(aim());

    // A team takes turns between two copies: see forward.cu.
    float* const partials = reinterpret_cast<float*>(shared + tiling.partials) +
                            (kAlone ? 0 : copy * kWarpsInTeam * cells);
    sums.each([&](int, int m, int n, float sum) {
      store_element(partials + warp_k * cells + partial_sum_of<NT>(warp_m * 16 + m, n), sum);
    });
    block_barrier();

    if (owner) {
      CellGradient<float> found[kCells];
      if (kServed) take_over(copy);
      // All cells first, without a branch: their latencies overlap.
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int n = row + 4 * i;
        const bool active = real && turn.row_0 + n < turn.now.count;
        const float dh =
            dh_given[i] + gather<(kAlone ? 0 : kWarpsInTeam)>(
                              partials + partial_sum_of<NT>(block_unit, n), cells, warps_k);
        const float dc = load_element(cell + (turn.tile * kCells + i) * owners + thread);
        found[i] = cell_gradient(slopes[i], dh, dc);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (!active) found[i].gate[k] = 0;
      }
      // First what others wait for.
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int n = row + 4 * i, b = turn.row_0 + n;
        const bool in_step = b < turn.now.count;
        Operand* const to =
            row_of(static_cast<Operand*>(given.dgates), turn.now.first + b, 4 * padded) + unit;
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = operand<kOperands>(found[i].gate[k]);
        if constexpr (kAlone) {
          char* const next =
              states + (2 * turn.tile + (~turn.s & 1)) * states_copy + n * tiling.state_stride;
          if (in_step && unit < padded) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              store_element(reinterpret_cast<Operand*>(
                                next + turned<kOperands>(n, (unit + k * padded) * int(sizeof(T)))),
                            Operand(word[k]));
              store_element(to + k * padded,
                            kFast ? Operand(word[k]) : Operand(float_bits(found[i].gate[k])));
            }
          }
        } else {
          publish_gradient(to, unit, padded, word, in_step && unit < padded);
        }
      }
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int b = turn.row_0 + row + 4 * i;
        if (!real || b >= turn.now.count) continue;
        store_element(cell + (turn.tile * kCells + i) * owners + thread, found[i].dc_before);
        if (b >= turn.after.count)  // the row's last step, its first in the direction's order
          static_cast<T*>(given.grad_c_0)[int64_t(b) * H + unit] = S::store(found[i].dc_before);
      }
    }
    if (kAlone) block_barrier();  // dgates are written, and the partial sums read
  }
}

using Kernel = void (*)(BackwardParams);

template <Operands kOperands>
Kernel kernel_for(const Plan& plan) {
  if (plan.alone) return backward_kernel<kOperands, true, 1>;
  if constexpr (kOperands != kF32)
    if (plan.tile_rows == 16) return backward_kernel<kOperands, false, 2>;
  return backward_kernel<kOperands, false, 1>;
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
