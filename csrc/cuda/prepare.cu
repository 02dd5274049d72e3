// What comes before a persistent launch: the recurrent weights in the order in which lanes load
// them, and h_0 where the first step looks for it.
//
// Packed weights, Words (16 bytes): (slices, warps, chunks, row tiles of a warp, 2, 32
// lanes); what lies where in a chunk of 64 bytes is in product.cuh. Rows and columns that do not
// exist are zero.
#include <algorithm>

#include "product.cuh"

namespace fused_lstm::cuda {
namespace {

struct PackParams {
  Tiling tiling;
  int H, B;
  int64_t words;      // of all packed weights of one direction, in Words
  int states_stride;  // bytes; zero where there are no states to start
  struct {
    const void* weight_hh;  // (4H, H)
    Words* packed;
    const void* h_0;  // (B, H)
    char* states;
  } direction[2];
  int directions;
};

// A tile of 16 rows of a block's weights: forward a row is a gate of a unit; backward it is a unit,
// and the columns are the gates of all units.
template <class T, Pass kPass>
struct WeightTile {
  static constexpr Pass kOf = kPass;
  const T* weight_hh;
  int H;
  const Tiling& tiling;
  int slice, tile;

  FUSED_LSTM_DEVICE T at(int row, int column) const {
    if constexpr (kPass == kForward) {
      int gate, unit;
      unit_of_row(tiling.row_tiles, tile, row, gate, unit);
      unit += slice * tiling.units;
      return unit < H && column < H ? weight_hh[int64_t(gate * H + unit) * H + column] : T(0);
    } else {
      const int to = slice * tiling.units + 16 * tile + row, padded = tiling.padded;
      // Comparisons: a division by a number known at run time takes as long as the load.
      const int gate = (column >= padded) + (column >= 2 * padded) + (column >= 3 * padded);
      const int unit = column - gate * padded;
      return to < H && unit < H ? weight_hh[int64_t(gate * H + unit) * H + to] : T(0);
    }
  }
};

// The four words that a lane loads of a tile, part m of a chunk of columns.
template <Operands kOperands, class Tile>
FUSED_LSTM_DEVICE Words packed(const Tile& weights, int chunk, int lane, int m) {
  using T = typename Storage<kOperands>::Type;
  const int first = chunk * (kChunkBytes / int(sizeof(T)));
  Words words;
  for (int r = 0; r < 4; ++r) {
    int row, word;
    weight_position<kOperands, Tile::kOf>(lane, m, r, row, word);
    if constexpr (sizeof(T) == 2) {
      const int column = first + 2 * word;
      words.word[r] = weights.at(row, column) | uint32_t(weights.at(row, column + 1)) << 16;
    } else {
      const float value = weights.at(row, first + word);
      words.word[r] = float_bits(kOperands == kTf32 ? round_tf32(value) : value);
    }
  }
  return words;
}

template <Operands kOperands, Pass kPass>
FUSED_LSTM_KERNEL(256)
pack_kernel(FUSED_LSTM_PARAMS(PackParams) p) {
  using S = Storage<kOperands>;
  using T = typename S::Type;
  const Tiling& tiling = p.tiling;
  const int d = block_index() % p.directions;
  const int blocks = block_count() / p.directions, block = block_index() / p.directions;
  const auto& given = p.direction[d];

  // A warp takes the words of one chunk of one tile, whose place it finds by divisions, at a time.
  const int lane = thread_index() % kLanes, warps = thread_count() / kLanes;
  const int row_tiles = tiling.row_tiles, pieces = int(p.words / (2 * kLanes));
  for (int piece = block * warps + thread_index() / kLanes; piece < pieces;
       piece += blocks * warps) {
    const int tile = piece % row_tiles, chunks = piece / row_tiles;  // of all warps and slices
    const int chunk = chunks % (kWarpsInTeam * tiling.chunks);       // of all warps
    const int slice = chunks / (kWarpsInTeam * tiling.chunks);
    const WeightTile<T, kPass> weights{static_cast<const T*>(given.weight_hh), p.H, tiling, slice,
                                       tile};
    for (int m = 0; m < 2; ++m)
      store_words(given.packed + (int64_t(piece) * 2 + m) * kLanes + lane,
                  packed<kOperands>(weights, chunk, lane, m));
  }

  // As operand() leaves them: no NaN of the user's may look like kNotYet.
  using Operand = typename S::Operand;
  const int columns = p.states_stride / int(sizeof(T));
  for (int b = block; columns > 0 && b < p.B; b += blocks)
    for (int column = thread_index(); column < columns; column += thread_count()) {
      const T* h_0 = static_cast<const T*>(given.h_0) + int64_t(b) * p.H;
      const float h = column < p.H ? S::load(h_0[column]) : 0;
      reinterpret_cast<Operand*>(given.states)[int64_t(b) * columns + column] =
          Operand(operand<kOperands>(h));
    }
}

template <Operands kOperands>
const char* launch_pack(const Plan& plan, const PackParams& params, Stream stream) {
  const int64_t work = std::max<int64_t>(params.words, int64_t(params.B) * params.H);
  const int blocks = int(std::min<int64_t>((work + 255) / 256, 1024)) * params.directions;
  const Grid grid{blocks, 256, 0, false};
  return plan.pass == kForward ? launch(pack_kernel<kOperands, kForward>, grid, stream, params)
                               : launch(pack_kernel<kOperands, kBackward>, grid, stream, params);
}

template <class Params>
const char* pack(const Plan& plan, const Params& params, PackParams pack_params, Stream stream) {
  pack_params.tiling = params.tiling;
  pack_params.H = params.extent.H;
  pack_params.B = params.extent.B;
  pack_params.words = packed_words(plan);
  pack_params.directions = plan.directions;
  return with_operands(plan.operands, [&](auto kind) {
    return launch_pack<decltype(kind)::value>(plan, pack_params, stream);
  });
}

}  // namespace

int64_t packed_words(const Plan& plan) {
  return int64_t(plan.slices) * kWarpsInTeam * plan.chunks * row_tiles(plan) * 2 * kLanes;
}

const char* pack_forward(const Plan& plan, const ForwardParams& params, Stream stream) {
  PackParams p{};
  p.states_stride = params.states_stride;
  for (int d = 0; d < plan.directions; ++d) {
    const ForwardTask& task = params.direction[d];
    p.direction[d] = {task.given.weight_hh, const_cast<Words*>(task.weights), task.given.h_0,
                      task.states};
  }
  return pack(plan, params, p, stream);
}

const char* pack_backward(const Plan& plan, const BackwardParams& params, Stream stream) {
  PackParams p{};
  for (int d = 0; d < plan.directions; ++d) {
    const BackwardTask& task = params.direction[d];
    p.direction[d] = {task.given.weight_hh, const_cast<Words*>(task.weights), nullptr, nullptr};
  }
  return pack(plan, params, p, stream);
}

}  // namespace fused_lstm::cuda
