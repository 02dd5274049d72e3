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
#include "activations.cuh"
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

template <Operands kOperands, bool kAlone, int NT>
FUSED_LSTM_KERNEL(kAlone ? 512 : 256)
forward_kernel(FUSED_LSTM_PARAMS(ForwardParams) params) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  using Operand = typename S::Operand;
  constexpr int MT = kAlone ? 2 : 4;  // gates i, f and g, o of 8 units are two tiles of 16 rows
  constexpr int kRows = 8 * NT;
  constexpr int kCells = kAlone ? 2 : 1;  // of a thread
  constexpr bool kFast = sizeof(T) == 2;
  const Tiling& tiling = params.tiling;
  const Extent& extent = params.extent;
  const Place place(tiling);
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

  const Cells<kAlone, NT> own(thread, place.slice, units, H);
  for (int k = thread; k < units; k += thread_count()) {
    const int at = place.slice * units + k;
    Words bias{};
    if (given.bias_ih && at < H) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        bias.word[gate] = float_bits(S::load(static_cast<const T*>(given.bias_ih)[gate * H + at]) +
                                     S::load(static_cast<const T*>(given.bias_hh)[gate * H + at]));
    }
    store_words(biases + k, bias);
  }
  for (int tile = 0; own.mine && tile < tiling.tiles; ++tile) {
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
      store_element(reinterpret_cast<Operand*>(states) + at, Operand(operand<kOperands>(h)));
    }
  }
  block_barrier();

  Walk walk(extent, tiling, place.group * kRows, tiling.groups * kRows, given.reverse);
  T x[kCells][4];  // x W_ih^T of this thread's cells, loaded a tile ahead
  const auto load_ahead = [&](const ForwardDirection& from, const Cells<kAlone, NT>& of) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int b = walk.row_0 + of.row + 4 * i;
      if (!of.real || b >= walk.now.count) continue;
      const T* gates = static_cast<const T*>(from.gates) + int64_t(walk.now.first + b) * 4 * H;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) x[i][gate] = load_element(gates + gate * H + of.unit);
    }
  };

  bool more = walk.next();
  if (more) load_ahead(given, own);
  for (int turn = 0; more; turn ^= 1) {
    const ForwardTask& task = params.direction[opaque(place.direction)];
    const ForwardDirection& given = task.given;
    Sums<kOperands, MT, NT, 1> sums;
    sums.clear();
    if constexpr (kAlone) {
      SharedStates<kOperands, NT> source;
      source.rows = states + (2 * walk.tile + (walk.s & 1)) * states_copy;
      source.stride = tiling.state_stride;
      multiply(sums, weights, task.weights, tiling, source);
    } else {
      constexpr int kColumns = kChunkBytes / int(sizeof(T));
      const int column = warp * tiling.chunks * kColumns + lane % 4 * (kColumns / 4);
      PublishedStates<kOperands, NT> source;
      source.chunks = (tiling.columns - column + kColumns - 1) / kColumns;
      source.all = task.states;
      source.stage = shared + tiling.states + warp * 2 * kRows * kChunkBytes;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int b = walk.row_0 + 8 * nt + lane / 4;
        const int from = b < walk.before.count ? extent.B + walk.before.first + b : b;
        source.rows[nt] = b < walk.now.count
                              ? from * (params.states_stride / 16) + column * int(sizeof(T)) / 16
                              : -1;
      }
      multiply(sums, weights, task.weights, tiling, source);
    }

    // A team takes turns between two copies: what is read here is written again only after the
    // barrier of the next tile, which no thread reaches before it has read.
    const int copy = units * kRows;  // Words
    Words* const partials = reinterpret_cast<Words*>(shared + tiling.partials) +
                            (kAlone ? 0 : turn * kWarpsInTeam * copy);
    sums.each([&](int mt, int m, int n, float sum) {
      const int at = partial_sum_of<NT>((kAlone ? warp : 0) + mt / 2, m % 8, n);
      store_element(
          reinterpret_cast<float*>(partials + (kAlone ? 0 : warp * copy) + at) + mt % 2 * 2 + m / 8,
          sum);
    });
    if (kAlone)
      warp_barrier();
    else
      block_barrier();

    // The same again: they would take registers that the product needs.
    const Cells<kAlone, NT> own(opaque(thread), place.slice, units, H);
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      if (!own.mine) break;
      const int n = own.row + 4 * i, b = walk.row_0 + n;
      const bool active = own.real && b < walk.now.count;
      const Words bias = load_words(biases + 8 * own.mu + own.u);
      float sum[4];
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        sum[gate] = bits_float(bias.word[gate]) + (active ? S::load(x[i][gate]) : 0);
#pragma unroll
      for (int k = 0; k < (kAlone ? 1 : kWarpsInTeam); ++k) {
        const Words partial =
            load_words(partials + k * copy + partial_sum_of<NT>(own.mu, own.u, n));
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sum[gate] += bits_float(partial.word[gate]);
      }
      float* const c = cell + (walk.tile * kCells + i) * cells + thread;
      const float in = sigmoid<kFast>(sum[0]), forget = sigmoid<kFast>(sum[1]);
      const float candidate = tanh<kFast>(sum[2]), out = sigmoid<kFast>(sum[3]);
      const float c_t = forget * load_element(c) + in * candidate;
      const float h = own.real ? out * tanh<kFast>(c_t) : 0;

      // First what others wait for.
      const uint32_t word = operand<kOperands>(h);
      if constexpr (kAlone) {
        char* next = states + (2 * walk.tile + (~walk.s & 1)) * states_copy;
        if (active)
          store_element(reinterpret_cast<Operand*>(next + n * tiling.state_stride) + own.unit,
                        Operand(word));
      } else {
        char* at = task.states + (extent.B + int64_t(walk.now.first) + b) * params.states_stride +
                   own.unit * int(sizeof(T));
        // Columns beyond H, up to the row's end, are read too.
        const bool within = b < walk.now.count && own.unit * int(sizeof(T)) < params.states_stride;
        if constexpr (sizeof(T) == 2) {
          const uint32_t pair = word | shuffle_xor(word, 1) << 16;  // the next unit's beside it
          if (within && own.unit % 2 == 0) publish(at, pair);
        } else {
          if (within) publish(at, word);
        }
      }
      if (!active) continue;
      store_element(c, c_t);
      const int64_t r = int64_t(walk.now.first) + b;
      store_element(static_cast<T*>(given.output) + r * given.output_stride + own.unit,
                    S::store(h));
      if (params.save) {
        T* gates = static_cast<T*>(given.gates) + r * 4 * H + own.unit;
        store_element(gates + 0, S::store(in));
        store_element(gates + H, S::store(forget));
        store_element(gates + 2 * H, S::store(candidate));
        store_element(gates + 3 * H, S::store(out));
        store_element(static_cast<T*>(given.cells) + r * H + own.unit, S::store(c_t));
      }
      if (b >= walk.after().count) {  // the row's last step
        static_cast<T*>(given.h_n)[int64_t(b) * H + own.unit] = S::store(h);
        static_cast<T*>(given.c_n)[int64_t(b) * H + own.unit] = S::store(c_t);
      }
    }
    more = walk.next();
    if (more) load_ahead(given, own);
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
