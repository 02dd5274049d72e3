// The backward pass through time, all steps in one launch, for one kind of operands
// (FUSED_LSTM_OPERANDS).
//
//   dh_t = grad_output_t + dgates_{t+1} W_hh
//   dgates_t, dc_{t-1} from dh_t, dc_t and what was saved
//
// The steps run against the direction's own order; "before" and "after" below mean this order. A
// block has 16 or 32 hidden units and multiplies with the columns of W_hh that belong to them,
// tile_rows rows of the batch at a time; the warps share the 4H gates that are summed over. Weights
// lie, and partial sums meet, as in forward.cu; dc stays in shared memory from step to step in fp32.
// dgates go to global memory, and that is what the blocks poll in the next step: it is filled with
// kNotYet before the launch, and nobody waits for more than the words that its lanes multiply. The
// products for dx, dW and db come after this, from dgates (host.cpp).
//
// All of a cell that does not wait for dh is computed before dh comes: with tiles of 8 rows by the
// half of the threads that has no cells, which hands it over (see forward.cu).
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial sums, two
// copies][dc][handed between the halves, two copies][kF32: a stage of each warp].
#include "cell.cuh"
#include "plain_product.cuh"

namespace fused_lstm::cuda {
namespace {

// Where the sum for a unit of row n lies among a block's partial sums, in floats: in the order in
// which lanes leave them, turned so that neither those that write (of units of a half of 16 and
// every other n by mma, of four units and any n in plain fp32) nor those that read (of a half and
// four n) meet in a bank.
template <int NT>
FUSED_LSTM_DEVICE int partial_sum_of(int unit, int n) {
  const int turn = unit / 4 % 2,
            place = (n ^ turn) % 2 * 8 + n / 2 % 2 * 4 + (n / 4 ^ turn) % 2 * 16;
  return (((unit / 16 * NT + n / 8) * 2 + unit / 8 % 2) * 2 + n % 2) * 32 + place + unit % 4;
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

// A thread's cells in each tile, or that of the thread that it serves: see forward.cu.
template <Operands kOperands, int kUnits, int NT>
struct Cells {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Own = CellPlace<kUnits, NT>;
  static constexpr int kRows = Own::kRows, kCount = Own::kCells;
  static constexpr int kThreads = Own::kThreads, kEach = Own::kEach;
  static constexpr bool kServed = kIsServed<kRows>;

  const BackwardParams& params;
  const Place place;
  char* const shared;
  const bool owner, works;  // works: prepares cells, its own or those that it serves
  Own own;
  const Handed handed;
  Saved<T> saved[kEach];
  CellSlopes<float> slopes[kEach] = {};
  float dh_given[kEach] = {};

  FUSED_LSTM_DEVICE explicit Cells(const BackwardParams& of)
      : params(of),
        place(of.tiling),
        shared(shared_memory()),
        owner(thread_index() < kCount),
        works(!kServed || !owner),
        own(thread_index(), place.slice),
        handed{reinterpret_cast<Words*>(shared + of.tiling.handed), kCount,
               thread_index() % kCount} {}

  FUSED_LSTM_DEVICE bool real(int k) const { return own.unit(k) < params.extent.H; }

  FUSED_LSTM_DEVICE const BackwardTask& task() const {
    return params.direction[opaque(place.direction)];
  }
  FUSED_LSTM_DEVICE float* gradients() const {  // dc
    return reinterpret_cast<float*>(shared + params.tiling.cell);
  }

  // See forward.cu.
  FUSED_LSTM_DEVICE void find_again() {
    if (kOperands == kF32 || kEach > 1) own = Own(opaque(thread_index()), place.slice);
  }

  // grad_c_n into shared memory.
  FUSED_LSTM_DEVICE void begin() const {
    const BackwardDirection& given = params.direction[place.direction].given;
    for (int tile = 0; owner && tile < params.tiling.tiles; ++tile) {
      const int b = (tile * params.tiling.groups + place.group) * kRows + own.row;
      const T* const grad_c_n = static_cast<const T*>(given.grad_c_n);
      for (int k = 0; k < kEach; ++k) {
        const bool here = given.grad_c_n && real(k) && b < params.extent.B;
        store_element(gradients() + tile * kCount + k * kThreads + thread_index(),
                      here ? S::load(row_of(grad_c_n, b, params.extent.H)[own.unit(k)]) : 0);
      }
    }
  }

  FUSED_LSTM_DEVICE void load_saved(const Turn& turn) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) load_saved(turn, k);
  }

  FUSED_LSTM_DEVICE void load_saved(const Turn& turn, int k) {
    const BackwardDirection& from = task().given;
    const int b = turn.row_0 + own.row, r = turn.now.first + b, H = params.extent.H;
    Saved<T>& to = saved[k];
    to = {};
    if (!real(k) || b >= turn.now.count) return;
    const T* const gates = row_of(static_cast<const T*>(from.gates), r, 4 * H) + own.unit(k);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) to.gate[gate] = load_element(gates + gate * H);
    const T* const all_c = static_cast<const T*>(from.cells) + own.unit(k);
    to.c = load_element(row_of(all_c, r, H));
    to.c_before = b < turn.after.count ? load_element(row_of(all_c, turn.after.first + b, H))
                                       : row_of(static_cast<const T*>(from.c_0), b, H)[own.unit(k)];
    if (!from.grad_output) return;
    to.grad_output =
        load_element(static_cast<const T*>(from.grad_output) +
                     grad_output_row(from, params.extent, turn.s, turn.now, b) + own.unit(k));
  }

  // All that does not wait for dh.
  FUSED_LSTM_DEVICE void prepare(const Turn& turn) {
    const BackwardDirection& from = task().given;
    const int b = turn.row_0 + own.row;
    const bool last = from.grad_h_n && b < turn.now.count && b >= turn.before.count;
    const T* const grad_h_n = static_cast<const T*>(from.grad_h_n);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      dh_given[k] = from.grad_output ? S::load(saved[k].grad_output) : 0;
      if (last && real(k))
        dh_given[k] += S::load(row_of(grad_h_n, b, params.extent.H)[own.unit(k)]);
      float gate[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) gate[n] = S::load(saved[k].gate[n]);
      slopes[k] =
          cell_slopes<sizeof(T) == 2>(gate, S::load(saved[k].c), S::load(saved[k].c_before));
    }
  }

  FUSED_LSTM_DEVICE void look_ahead(const BackwardDirection& given, const Turn& turn,
                                    const Walk& walk) const {
    if (!works || !real(0) || own.u != 0) return;
    const int step = turn.s + kStepsPrefetched;
    const RowRun then = walk.rows(step);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (real(k))
        prefetch_cell<T>(given, params.extent, step, then, turn.row_0 + own.row, own.unit(k),
                         params.tiling.padded);
  }

  // A thread's cells in one tile, from the warps' partial sums.
  FUSED_LSTM_DEVICE void update(const BackwardDirection& given, const Turn& turn,
                                const float* partials, int copy) {
    if (kServed) handed.take(copy, slopes[0], dh_given[0]);
    const int b = turn.row_0 + own.row, r = turn.now.first + b, padded = params.tiling.padded;
    const bool in_step = b < turn.now.count;
    float* const dc = gradients() + turn.tile * kCount + thread_index();
    CellGradient<float> found[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int at = partial_sum_of<NT>(own.in_block(k), own.row);
      const float dh = dh_given[k] + gather(partials + at, kCount);
      found[k] = cell_gradient(slopes[k], dh, load_element(dc + k * kThreads));
    }
    // First what others wait for.
    using Operand = typename S::Operand;
    Operand* const dgates = row_of(static_cast<Operand*>(given.dgates), r, 4 * padded);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      uint32_t word[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        word[n] = operand<kOperands>(in_step && real(k) ? found[k].gate[n] : 0);
      publish_gradient(dgates + own.unit(k), own.unit(k), padded, word,
                       in_step && own.unit(k) < padded);
    }
    if (!in_step) return;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!real(k)) return;
      store_element(dc + k * kThreads, found[k].dc_before);
      if (b >= turn.after.count)  // the row's last step, its first in the direction's order
        row_of(static_cast<T*>(given.grad_c_0), b, params.extent.H)[own.unit(k)] =
            S::store(found[k].dc_before);
    }
  }
};

template <Operands kOperands, int kUnits, int NT>
FUSED_LSTM_KERNEL(32 * kWarpsInTeam)
backward_kernel(FUSED_LSTM_PARAMS(BackwardParams) params) {
  constexpr int MT = kRowTiles<kBackward, kUnits>;
  using Cells = Cells<kOperands, kUnits, NT>;
  const Tiling& tiling = params.tiling;
  Cells cells(params);
  const Place& place = cells.place;
  const BackwardTask& first = params.direction[place.direction];
  char* const shared = cells.shared;

  Weights<MT, kRegisterChunks<kBackward, kOperands, kUnits, Cells::kRows>> weights;
  weights.load(first.weights, tiling, shared);
  cells.begin();

  PublishedStates<kOperands, MT, NT> source(first.given.dgates, tiling, shared);
  Words state[source.kAhead][NT];
  Walk walk(params.extent, tiling, place.group * Cells::kRows, tiling.groups * Cells::kRows,
            !first.given.reverse);
  const auto aim = [&] {
    const Turn& turn = walk.turn();
    const int stride = 4 * tiling.padded * int(sizeof(typename Cells::T));
    return source.aim_at(tiling, stride, weights.chunks, [&](int n, int& row, bool& takes_part) {
      const int b = turn.row_0 + n;
      row = turn.before.first + b;
      takes_part = b < turn.before.count && b < turn.now.count;
    });
  };

  bool more = walk.next();
  const bool early = walk.several();  // see forward.cu
  if (more && early) source.set_out(aim(), weights.chunks, state);
  if (more && !cells.owner) cells.load_saved(walk.turn());
  for (int copy = 0; more; copy ^= 1) {
    const Turn turn = walk.turn();
    const BackwardTask& task = cells.task();
    if (!Cells::kServed) cells.load_saved(turn);
    if (cells.works) cells.prepare(turn);
    if (Cells::kServed && !cells.owner) cells.handed.put(copy, cells.slopes[0], cells.dh_given[0]);
    const Aim<NT> here = aim();
    more = walk.next();
    if (!early) source.set_out(here, weights.chunks, state);
    if (Cells::kServed && !cells.owner && more) cells.load_saved(walk.turn());
    cells.look_ahead(task.given, turn, walk);
    Sums<kOperands, MT, NT, 4 / NT> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    if (early && more) source.set_out(aim(), weights.chunks, state);

    // Blocks take turns between two copies: see forward.cu.
    float* const partials =
        reinterpret_cast<float*>(shared + tiling.partials) + copy * kWarpsInTeam * Cells::kCount;
    sums.each([&](int mt, int m, int n, float sum) {
      const int at = partial_sum_of<NT>(16 * mt + m, n);
      store_element(partials + thread_index() / kLanes * Cells::kCount + at, sum);
    });
    block_barrier();

    cells.find_again();
    if (cells.owner) cells.update(task.given, turn, partials, copy);
  }
}

}  // namespace

template <Operands kOperands>
BackwardKernel backward_kernel_for(const Plan& plan) {
  if constexpr (kOperands != kF32) {  // whose sums would take all the registers
    if (plan.units == 32) return backward_kernel<kOperands, 32, 2>;
    if (plan.tile_rows == 16) return backward_kernel<kOperands, 16, 2>;
  }
  return backward_kernel<kOperands, 16, 1>;
}

template BackwardKernel backward_kernel_for<FUSED_LSTM_OPERANDS>(const Plan&);

}  // namespace fused_lstm::cuda
