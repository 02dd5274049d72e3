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

// The sum and those of the warps for the same cell, `copy` floats apart.
FUSED_LSTM_DEVICE float gather(float sum, const float* partials, int copy, int warps) {
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
template <class T, bool kAlone, int kRows>
FUSED_LSTM_DEVICE void prefetch_step(const BackwardDirection& given, const Extent& extent,
                                     const Walk& walk, int unit, int units, int padded) {
  const int H = extent.H;
  const Rows then = walk.later(kStepsPrefetched);
  const Strip strip(then, walk.row_0, kRows, unit, units, H);
  strip.prefetch(static_cast<const T*>(given.gates), 4 * H, 4, H);
  if (!kAlone) strip.prefetch(static_cast<const T*>(given.dgates), 4 * padded, 4, padded);
  if (given.grad_output && strip.any) {
    const int64_t at =
        grad_output_row(given, extent, walk.s + kStepsPrefetched, then, strip.row - then.first);
    strip.prefetch_row(static_cast<const T*>(given.grad_output) + at, 1, 0);
  }
  const Strip before(walk.later(kStepsPrefetched + 1), walk.row_0, kRows, unit, units, H);
  before.prefetch(static_cast<const T*>(given.cells), H, 1, 0);
}

template <Operands kOperands, bool kAlone, int NT>
FUSED_LSTM_KERNEL(kAlone ? 512 : 256)
backward_kernel(FUSED_LSTM_PARAMS(BackwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Operand = typename S::Operand;
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kAlone ? 2 : 1;  // of a thread
  constexpr bool kFast = sizeof(T) == 2;
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

  // This thread's cells: one unit, and the same rows of each tile.
  const int mu = kAlone ? warp : thread / 8 / kRows, block_unit = 8 * mu + thread % 8;
  const int row = kAlone ? lane / 8 : thread / 8 % kRows;  // and the fourth from there
  const int unit = slice * units + block_unit;
  const bool mine = 8 * mu < units, real = mine && unit < H;
  for (int tile = 0; mine && tile < tiling.tiles; ++tile) {
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

  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, !given.reverse);
  Saved<T> saved[kCells] = {};
  const auto load_ahead = [&](const BackwardDirection& from) {
    if (!real) return;
    const Rows after = walk.after();
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = walk.row_0 + row + 4 * i;
      if (b >= walk.now.count) continue;
      const int64_t r = int64_t(walk.now.first) + b;
      const T* gates = static_cast<const T*>(from.gates) + r * 4 * H + unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) saved[i].gate[gate] = load_element(gates + gate * H);
      const T* all_c = static_cast<const T*>(from.cells) + unit;
      saved[i].c = load_element(all_c + r * H);
      saved[i].c_before = b < after.count ? load_element(all_c + (int64_t(after.first) + b) * H)
                                          : static_cast<const T*>(from.c_0)[int64_t(b) * H + unit];
      if (!from.grad_output) continue;
      const int64_t at = grad_output_row(from, extent, walk.s, walk.now, b);
      saved[i].grad_output = load_element(static_cast<const T*>(from.grad_output) + at + unit);
    }
  };

  bool more = walk.next();
  if (more) load_ahead(given);
  for (int turn = 0; more; turn ^= 1) {
    const BackwardTask& task = params.direction[opaque(place.direction)];
    const BackwardDirection& given = task.given;
    Sums<kOperands, 1, NT, (kAlone ? 1 : 4 / NT)> sums;
    sums.clear();
    constexpr int kColumns = kChunkBytes / int(sizeof(T));
    const int column = warp_k * tiling.chunks * kColumns;
    if constexpr (kAlone) {
      SharedStates<kOperands, NT> source;
      source.rows = states + (2 * walk.tile + (walk.s & 1)) * states_copy + column * int(sizeof(T));
      source.stride = tiling.state_stride;
      multiply(sums, weights, task.weights, tiling, source);
    } else {
      const int lane_column = column + lane % 4 * (kColumns / 4);
      PublishedStates<kOperands, NT> source;
      source.chunks = (tiling.columns - lane_column + kColumns - 1) / kColumns;
      source.all = static_cast<const char*>(given.dgates);
      source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int b = walk.row_0 + 8 * nt + lane / 4;
        const int row_words = 4 * padded * int(sizeof(T)) / 16;
        source.rows[nt] =
            b < walk.before.count && b < walk.now.count
                ? (walk.before.first + b) * row_words + lane_column * int(sizeof(T)) / 16
                : -1;
      }
      multiply(sums, weights, task.weights, tiling, source);
    }

    // A team takes turns between two copies: see forward.cu.
    float* const partials = reinterpret_cast<float*>(shared + tiling.partials) +
                            (kAlone ? 0 : turn * kWarpsInTeam * cells);
    sums.each([&](int, int m, int n, float sum) {
      store_element(partials + warp_k * cells + partial_sum_of<NT>(warp_m * 16 + m, n), sum);
    });
    block_barrier();

    if (mine) {  // the same for all lanes of a warp
      // All cells first, without a branch: their latencies overlap.
      CellGradient<float> found[kCells];
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int n = row + 4 * i, b = walk.row_0 + n;
        const bool active = real && b < walk.now.count;
        float dh = gather(given.grad_output ? S::load(saved[i].grad_output) : 0,
                          partials + partial_sum_of<NT>(block_unit, n), cells, warps_k);
        if (active && b >= walk.before.count && given.grad_h_n)
          dh += S::load(static_cast<const T*>(given.grad_h_n)[int64_t(b) * H + unit]);
        float gate[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) gate[k] = S::load(saved[i].gate[k]);
        const float dc = load_element(cell + (walk.tile * kCells + i) * owners + thread);
        found[i] =
            cell_gradient<kFast>(gate, S::load(saved[i].c), S::load(saved[i].c_before), dh, dc);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (!active) found[i].gate[k] = 0;
      }
      // First what others wait for.
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const int n = row + 4 * i, b = walk.row_0 + n;
        const bool in_step = b < walk.now.count;
        Operand* const to =
            static_cast<Operand*>(given.dgates) + (int64_t(walk.now.first) + b) * 4 * padded + unit;
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) word[k] = operand<kOperands>(found[i].gate[k]);
        if constexpr (kAlone) {
          char* const next =
              states + (2 * walk.tile + (~walk.s & 1)) * states_copy + n * tiling.state_stride;
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
        const int b = walk.row_0 + row + 4 * i;
        if (!real || b >= walk.now.count) continue;
        store_element(cell + (walk.tile * kCells + i) * owners + thread, found[i].dc_before);
        if (b >= walk.after().count)  // the row's last step, its first in the direction's order
          static_cast<T*>(given.grad_c_0)[int64_t(b) * H + unit] = S::store(found[i].dc_before);
      }
    }
    prefetch_step<T, kAlone, kRows>(given, extent, walk, slice * units, units, padded);
    more = walk.next();
    if (more) load_ahead(given);
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
