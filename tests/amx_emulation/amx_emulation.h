// AMX's tile instructions in plain C++, so that the AMX kernel runs on a processor without them.
// What Intel's Software Developer's Manual says of each (TILELOADD, TILESTORED, TDPBF16PS): rows
// and row bytes come from the configuration, rows beyond them are zero, and using an unconfigured
// tile is an error, here an abort.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct State {
  uint8_t rows[16];
  uint16_t row_bytes[16];
  uint8_t data[8][16][64];
  bool configured;
};
static thread_local State state;

static inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

static inline void load_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1, "palette must be 1");
  std::memset(&state, 0, sizeof state);
  std::memcpy(state.row_bytes, bytes + 16, 32);
  std::memcpy(state.rows, bytes + 48, 16);
  for (int t = 0; t < 8; ++t)
    require(state.rows[t] <= 16 && state.row_bytes[t] <= 64, "a tile is at most 16 x 64 bytes");
  state.configured = true;
}

static inline void load(int tile, const void* base, int64_t stride) {
  require(state.configured && state.rows[tile], "tile not configured");
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(state.data[tile][r], static_cast<const char*>(base) + r * stride,
                state.row_bytes[tile]);
}

static inline void store(int tile, void* base, int64_t stride) {
  require(state.configured && state.rows[tile], "tile not configured");
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, state.data[tile][r], state.row_bytes[tile]);
}

static inline float widen(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline void dot_bf16(int sum, int a, int b) {
  const int rows = state.rows[sum], columns = state.row_bytes[sum] / 4,
            pairs = state.row_bytes[a] / 4;
  require(
      state.rows[a] == rows && state.row_bytes[b] == state.row_bytes[sum] && state.rows[b] == pairs,
      "tile shapes do not fit");
  for (int m = 0; m < rows; ++m)
    for (int k = 0; k < pairs; ++k)
      for (int n = 0; n < columns; ++n) {
        float value;
        std::memcpy(&value, &state.data[sum][m][4 * n], 4);
        value += widen(&state.data[a][m][4 * k]) * widen(&state.data[b][k][4 * n]);
        value += widen(&state.data[a][m][4 * k + 2]) * widen(&state.data[b][k][4 * n + 2]);
        std::memcpy(&state.data[sum][m][4 * n], &value, 4);
      }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() (amx_emulation::state.configured = false)
#define _tile_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store(tile, base, stride)
#define _tile_dpbf16ps(sum, a, b) amx_emulation::dot_bf16(sum, a, b)
