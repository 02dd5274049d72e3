// The forward pass, all steps in one launch, for one kind of operands (FUSED_LSTM_OPERANDS).
//
//   gates = (x W_ih^T)_t + b_ih + b_hh + h_{t-1} W_hh^T;  c_t, h_t as in ../lstm.h
//
// A block has 16 hidden units, in plain fp32 also 12 or 8, all four gates of them, and multiplies
// tile_rows rows of the batch at a time: each warp a share of the columns of W_hh, with its weights
// in registers, and in shared memory what does not fit there. The partial sums meet in shared
// memory; one thread then updates one cell, whose c stays in shared memory from step to step in
// fp32. h goes to `output`, and for the next step into `states` in global memory, which is filled
// with kNotYet before the launch: the words themselves say that they are there, and no block waits
// for more than the words that its lanes multiply. Row b of `states` is h_0, row B + r the h of
// packed row r, so that no word is written twice.
//
// With tiles of 8 rows at most half of the threads have cells, and as many serve these: they load
// x, hand over what the sums begin with, and save what the cells found. One thread's instructions
// follow each other at some 7 cycles each, and others wait for those between the last product and
// the publication, and between that and the next look at what others have published.
//
// Shared memory: [weights that registers don't hold, as far as there is room][partial sums, two
// copies][biases][c][handed between the halves, two copies][kF32: a stage of each warp].
#include "cell.cuh"
#include "plain_product.cuh"

namespace fused_lstm::cuda {
namespace {

// Where the four gates of unit 8 mu + u of row n lie among a block's partial sums, in Words: in the
// order in which mma leaves them (n / 2 in q), turned so that neither the lanes that write (u, q)
// nor those that read (u, n) meet in a bank. Of the last four units, where there are not eight, 8
// lanes write rows n and n + 4 and read n and n + 1.
template <int kUnits, int NT>
FUSED_LSTM_DEVICE int partial_sum_of(int mu, int u, int n) {
  if (kUnits % 8 && mu == kUnits / 8) return mu * NT * 64 + (n * 4 ^ n / 4 % 2 * 4) + u;
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

// A thread's cells in each tile, or those of the thread that it serves: one, or with 32 rows two,
// of units 8 apart, whose chains run beside each other.
template <Operands kOperands, int kUnits, int NT>
struct Cells {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Own = CellPlace<kUnits, NT>;
  static constexpr int kRows = Own::kRows, kCount = Own::kCells;
  static constexpr int kThreads = Own::kThreads, kEach = Own::kEach;
  using X = T[kEach][4];  // x W_ih^T of the cells
  static constexpr bool kServed = kIsServed<kRows>;

  const ForwardParams& params;
  const Place place;
  char* const shared;
  const bool owner, serves;
  Own own;
  const Handed handed;
  int unsaved = -1;  // the row whose cell the other half has handed over

  FUSED_LSTM_DEVICE explicit Cells(const ForwardParams& of)
      : params(of),
        place(of.tiling),
        shared(shared_memory()),
        owner(thread_index() < kCount),
        serves(kServed && thread_index() / kCount == 1),
        own(thread_index(), place.slice),
        handed(shared + of.tiling.handed, kCount, thread_index() % kCount) {}

  FUSED_LSTM_DEVICE bool real(int k) const { return own.unit(k) < params.extent.H; }

  // Looked up anew at each use: see `opaque`.
  FUSED_LSTM_DEVICE const ForwardTask& task() const {
    return params.direction[opaque(place.direction)];
  }
  FUSED_LSTM_DEVICE float* states() const {
    return reinterpret_cast<float*>(shared + params.tiling.cell);
  }
  FUSED_LSTM_DEVICE Words* biases() const {
    return reinterpret_cast<Words*>(shared + params.tiling.bias);
  }

  // Finds the place again where keeping it would take registers that the product needs.
  FUSED_LSTM_DEVICE void find_again() {
    if (!kServed || kOperands == kTf32) own = Own(opaque(thread_index()), place.slice);
  }

  // The biases' sums and c_0 into shared memory.
  FUSED_LSTM_DEVICE void begin() const {
    const ForwardDirection& given = params.direction[place.direction].given;
    const int thread = thread_index(), H = params.extent.H;
    if (thread < kUnits) {
      const int at = place.slice * kUnits + thread;
      float bias[4] = {};
      if (given.bias_ih && at < H) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          bias[gate] = S::load(static_cast<const T*>(given.bias_ih)[gate * H + at]) +
                       S::load(static_cast<const T*>(given.bias_hh)[gate * H + at]);
      }
      store_words(biases() + thread, words_of(bias));
    }
    for (int tile = 0; owner && tile < params.tiling.tiles; ++tile) {
      const int b = (tile * params.tiling.groups + place.group) * kRows + own.row;
      const T* const c_0 = row_of(static_cast<const T*>(given.c_0), b, H);
      for (int k = 0; k < kEach; ++k)
        store_element(states() + tile * kCount + k * kThreads + thread,
                      real(k) && b < params.extent.B ? S::load(c_0[own.unit(k)]) : 0);
    }
  }

  FUSED_LSTM_DEVICE void load_x(const Turn& turn, X& x) const {
    const int b = turn.row_0 + own.row, H = params.extent.H;
    if (b >= turn.now.count) return;
    const T* gates = row_of(static_cast<const T*>(task().given.gates), turn.now.first + b, 4 * H);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (real(k))
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          x[k][gate] = load_element(gates + gate * H + own.unit(k));
  }

  // Of the k-th cell.
  FUSED_LSTM_DEVICE void begin_sums(const T (&x)[4], const Turn& turn, int k,
                                    float (&sum)[4]) const {
    floats_of(load_words(biases() + own.in_block(k)), sum);
    const bool active = real(k) && turn.row_0 + own.row < turn.now.count;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) sum[gate] += active ? S::load(x[gate]) : 0;
  }

  FUSED_LSTM_DEVICE void hand_sums(const X& x, const Turn& turn, int copy) const {
    float sum[4];
    begin_sums(x[0], turn, 0, sum);
    handed.put(copy, sum);
  }

  // Into L2: one unit of eight does it for all of them, their cells lie in the same sectors.
  FUSED_LSTM_DEVICE void look_ahead(const ForwardTask& task, const Turn& turn,
                                    const Walk& walk) const {
    if (!(kServed ? serves : owner) || !real(0) || own.u != 0) return;
    const RowRun then = walk.rows(turn.s + kStepsPrefetched);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (real(k)) prefetch_cell<T>(params, task, then, turn.row_0 + own.row, own.unit(k));
  }

  // A thread's cells in one tile, from the warps' partial sums.
  FUSED_LSTM_DEVICE void update(const ForwardTask& task, const Turn& turn, const X& x,
                                const Words* partials, int copy, bool more) {
    const int b = turn.row_0 + own.row, r = turn.now.first + b;
    float* const c = states() + turn.tile * kCount + thread_index();
    Cell<float> found[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      float sum[4];
      if (kServed)
        handed.take(copy, sum);
      else
        begin_sums(x[k], turn, k, sum);
      gather(sum,
             partials + partial_sum_of<kUnits, NT>(own.mu + k * Own::kApart / 8, own.u, own.row),
             kCount);
      found[k] = update_cell<sizeof(T) == 2>(sum, load_element(c + k * kThreads));
      if (!real(k)) found[k].h = 0;
    }
    // First what others wait for. Columns beyond H, up to the row's end, are read too.
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      publish_state<T>(row_of(task.states, params.extent.B + r, params.states_stride), own.unit(k),
                       operand<kOperands>(found[k].h),
                       b < turn.now.count && own.unit(k) * int(sizeof(T)) < params.states_stride);
    if (b >= turn.now.count) return;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!real(k)) return;
      store_element(c + k * kThreads, found[k].c);
      if (b >= turn.after.count) {  // the row's last step
        const ForwardDirection& to = task.given;
        row_of(static_cast<T*>(to.h_n), b, params.extent.H)[own.unit(k)] = S::store(found[k].h);
        row_of(static_cast<T*>(to.c_n), b, params.extent.H)[own.unit(k)] = S::store(found[k].c);
      }
      if (kServed && more)
        handed.put(copy, found[k]);
      else
        save_cell(r, k, found[k]);
    }
  }

  // What these threads' cells found in the tile before, and what they begin the next one with.
  FUSED_LSTM_DEVICE void serve(const Turn& turn, const Turn& following, int copy, bool more) {
    X x;
    if (more) load_x(following, x);
    if (unsaved >= 0) {
      Cell<float> found;
      handed.take(copy ^ 1, found);
      save_cell(unsaved, 0, found);
    }
    const int b = turn.row_0 + own.row;
    unsaved = real(0) && b < turn.now.count ? turn.now.first + b : -1;
    if (more) hand_sums(x, following, copy ^ 1);
  }

  FUSED_LSTM_DEVICE void save_cell(int r, int k, const Cell<float>& of) const {
    save<S>(task().given, params.save, r, params.extent.H, own.unit(k), of);
  }
};

template <Operands kOperands, int kUnits, int NT>
FUSED_LSTM_KERNEL(32 * kWarpsInTeam)
forward_kernel(FUSED_LSTM_PARAMS(ForwardParams) params) {
  constexpr int MT = kRowTiles<kForward, kUnits>;
  using Cells = Cells<kOperands, kUnits, NT>;
  const Tiling& tiling = params.tiling;
  Cells cells(params);
  const Place& place = cells.place;
  const ForwardTask& first = params.direction[place.direction];
  char* const shared = cells.shared;

  Weights<MT, kRegisterChunks<kForward, kOperands, kUnits, Cells::kRows>> weights;
  weights.load(first.weights, tiling, shared);
  cells.begin();
  block_barrier();

  PublishedStates<kOperands, MT, NT> source(first.states, tiling, shared);
  Words state[source.kAhead][NT];
  Walk walk(params.extent, tiling, place.group * Cells::kRows, tiling.groups * Cells::kRows,
            first.given.reverse);
  const auto aim = [&] {  // row b of the states is h_0, row B + r that of packed row r
    const Turn& turn = walk.turn();
    return source.aim_at(
        tiling, params.states_stride, weights.chunks, [&](int n, int& row, bool& takes_part) {
          const int b = turn.row_0 + n;
          row = b < turn.before.count ? params.extent.B + turn.before.first + b : b;
          takes_part = b < turn.now.count;
        });
  };

  bool more = walk.next();
  const bool early = walk.several();
  if (more && early) source.set_out(aim(), weights.chunks, state);
  if (more && cells.serves) {
    typename Cells::X x;
    cells.load_x(walk.turn(), x);
    cells.hand_sums(x, walk.turn(), 0);
  }
  for (int copy = 0; more; copy ^= 1) {
    const Turn turn = walk.turn();
    const ForwardTask& task = cells.task();
    typename Cells::X x;
    if (!Cells::kServed) cells.load_x(turn, x);
    const Aim<NT> here = aim();
    more = walk.next();
    if (!early) source.set_out(here, weights.chunks, state);
    cells.look_ahead(task, turn, walk);
    Sums<kOperands, MT, NT, 1> sums;
    sums.clear();
    multiply(sums, weights, task.weights, tiling, source, state);
    // With several tiles, what the next one multiplies was published long ago: it comes during the
    // cells. With one, it can't be there before this block has published its own.
    if (early && more) source.set_out(aim(), weights.chunks, state);

    // Blocks take turns between two copies: what is read here is written again only after the
    // barrier of the next tile, which no thread reaches before it has read.
    Words* const partials =
        reinterpret_cast<Words*>(shared + tiling.partials) + copy * kWarpsInTeam * Cells::kCount;
    sums.each_unit([&](int mu, int u, int n, const Words& gates) {
      store_words(
          partials + thread_index() / kLanes * Cells::kCount + partial_sum_of<kUnits, NT>(mu, u, n),
          gates);
    });
    block_barrier();

    cells.find_again();
    if (cells.owner)
      cells.update(task, turn, x, partials, copy, more);
    else if (cells.serves)
      cells.serve(turn, walk.turn(), copy, more);
  }
}

}  // namespace

template <Operands kOperands>
ForwardKernel forward_kernel_for(const Plan& plan) {
  if constexpr (kOperands == kF32) {  // whose sums would take all the registers for 16 rows
    if (plan.units == 8) return forward_kernel<kOperands, 8, 1>;
    if (plan.units == 12) return forward_kernel<kOperands, 12, 1>;
  } else {
    if (plan.tile_rows == 32) return forward_kernel<kOperands, 16, 4>;
    if (plan.tile_rows == 16) return forward_kernel<kOperands, 16, 2>;
  }
  return forward_kernel<kOperands, 16, 1>;
}

template ForwardKernel forward_kernel_for<FUSED_LSTM_OPERANDS>(const Plan&);

}  // namespace fused_lstm::cuda
