// The bfloat16 product on AMX: 32 rows against NV * 16 columns as two passes of 2 x 2 sum tiles (16
// x 16 float each), so that a tile of the panel is loaded once for 32 rows. Same operands and
// panels as product.h; K is padded to whole tiles (32). tests/amx_emulation defines the intrinsics
// in software where no AMX exists.
#pragma once

#if defined(FUSED_LSTM_EMULATE_AMX)
#include "amx_emulation.h"
#define FUSED_LSTM_TILE_BF16 1
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define FUSED_LSTM_TILE_BF16 1
#endif

#ifdef FUSED_LSTM_TILE_BF16
namespace fused_lstm::cpu::FUSED_LSTM_ISA {

struct ProductAmx {
  using Elem = BFloat16;
  using Panel = BFloat16;
  using A = float;
  static constexpr int kStepK = 2, kPadK = 32;
  static constexpr int kTile = 16;           // rows of a tile, floats of its row
  static constexpr int64_t kTileBytes = 64;  // bytes of a tile's row
  static constexpr int64_t kTileSize = kTile * kPadK;
  static constexpr int64_t kOutBytes = kTileWidth<float> * int64_t(sizeof(float));

  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  static constexpr bool kFetches = false;
  static int max_rows(int) { return 2 * kTile; }
  static int next_rows(int64_t left, int) { return left < 2 * kTile ? int(left) : 2 * kTile; }
  static void end() {
    _tile_release();
    configured() = 0;
  }

  // Where in a panel of so many vectors the columns of one of them begin at a step of K: a tile
  // lies in one piece.
  static constexpr int64_t panel_at(int64_t step, int vector, int vectors, int64_t) {
    return (step / kTile * vectors + vector) * kTileSize + step % kTile * kPadK;
  }

  // As Product's, but each column becomes a row of K, in tiles.
  static constexpr int kStripRows = 2 * kTile;
  static constexpr bool kStripIsTransposed = true;
  static constexpr int64_t strip_stride() { return kPadK; }
  static constexpr int64_t strip_step() { return kStripRows * kStepK; }

  // Tiles 0..3: sums [row half][column half]; 4, 5: operand rows; 6, 7: panel columns.
  static void configure(int rows) {
    if (rows == configured()) return;
    configured() = rows;
    const int first = rows < kTile ? rows : kTile, second = rows > kTile ? rows - kTile : 1;
    Config config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kTileBytes;
    config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first);
    config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second);
    config.rows[6] = config.rows[7] = kTile;
    _tile_loadconfig(&config);
  }

  // How many rows this thread's tiles are configured for: to configure them takes as long as a
  // tenth of a product of K 96.
  static int& configured() {
    static thread_local int rows = 0;
    return rows;
  }

  template <bool two_rows, bool two_columns>
  static void block(int vectors, const Tile<Elem, A>& t) {
    const A* init_below = t.init + kTile * t.init_stride;
    const int64_t init_bytes = t.init_stride * int64_t(sizeof(A));
    A* out_below = t.out + kTile * kTileWidth<A>;
    _tile_loadd(0, t.init, init_bytes);
    if constexpr (two_columns) _tile_loadd(1, t.init + kTile, init_bytes);
    if constexpr (two_rows) _tile_loadd(2, init_below, init_bytes);
    if constexpr (two_rows && two_columns) _tile_loadd(3, init_below + kTile, init_bytes);
    const int64_t operand_bytes = t.stride * int64_t(sizeof(Elem));
    const Elem* operand = t.operand;
    const Elem* operand_below = operand + kTile * t.stride;
    const Elem* panel = t.panel;
    for (int64_t pairs = t.steps; pairs > 0; pairs -= kTile) {
      _tile_loadd(6, panel, kTileBytes);
      if constexpr (two_columns) _tile_loadd(7, panel + kTileSize, kTileBytes);
      _tile_loadd(4, operand, operand_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (two_columns) _tile_dpbf16ps(1, 4, 7);
      if constexpr (two_rows) {
        _tile_loadd(5, operand_below, operand_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (two_columns) _tile_dpbf16ps(3, 5, 7);
      }
      operand += kTile * t.step;
      operand_below += kTile * t.step;
      panel += vectors * kTileSize;
    }
    _tile_stored(0, t.out, kOutBytes);
    if constexpr (two_columns) _tile_stored(1, t.out + kTile, kOutBytes);
    if constexpr (two_rows) _tile_stored(2, out_below, kOutBytes);
    if constexpr (two_rows && two_columns) _tile_stored(3, out_below + kTile, kOutBytes);
  }

  static void run(int rows, int vectors, const Tile<Elem, A>& tile) {
    configure(rows);
    for (int v = 0; v < vectors; v += 2) {
      Tile<Elem, A> part = tile;
      part.panel += v * kTileSize;
      part.init += v * kTile;
      part.out += v * kTile;
      const bool two_columns = v + 1 < vectors;
      if (rows > kTile) {
        two_columns ? block<true, true>(vectors, part) : block<true, false>(vectors, part);
      } else {
        two_columns ? block<false, true>(vectors, part) : block<false, false>(vectors, part);
      }
    }
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
#endif
