// The product of a tile: MR rows of an operand against NV vectors of columns, summed in registers
// over K, from packed panels.
//
//   operand  rows `stride` apart, steps of K `step` apart, of the product's type; zero up to a
//            multiple of kPadK
//   panel    [K / kStepK][NV][lanes][kStepK], K padded likewise: the columns of one tile, as they
//            are read; with 16 registers two vectors of it, then the rest (AMX: [K / 32][NV][16]
//            [lanes][2]; `panel_at` has each)
//   init     (MR, NV * lanes) rows `init_stride` apart: what the sums start from (0: the same row
//            for all)
//   out      (MR, NV * lanes) of the accumulation type, rows kTileWidth (four vectors) apart
//
// Every sum runs over K in the same order whatever MR and NV are, so how the work is split over
// threads never changes a bit of the result: stretches of kStretch steps are summed from zero and
// added up, which keeps the rounding error of a long K at that of a short one. MR * NV sums fill
// the registers: 24 of 32, or 12 of 16. Four vectors of more rows than that are taken two at a
// time, for half as many bytes of the panel a multiply-add; with 16 registers that is every tile of
// more than three rows, so the two lie together, for every line of a cache is one that is read.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define FUSED_LSTM_DOT_BF16 1
#endif

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 32;
constexpr int64_t kStretch = 64;
constexpr int64_t kLine = 64;  // bytes that a processor fetches at once

inline constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// How rows of an operand (Elem) meet columns of a panel (Panel) in a step of K, which is kStepK
// elements of each.
template <class Elem_, class Acc_>
struct Multiply {
  using Elem = Elem_;
  using Panel = Elem_;
  using Acc = Acc_;
  static constexpr int kStepK = 1, kPadK = 1;
  static constexpr int64_t kSteps = kStretch;  // of a stretch
  using Column = Vec<Acc>;
  using Row = Vec<Acc>;
  FUSED_LSTM_INLINE Column column(const Elem* p) { return load(p); }
  FUSED_LSTM_INLINE Row row(const Elem* p) { return splat<Acc>(*p); }
  FUSED_LSTM_INLINE Vec<Acc> add(Vec<Acc> sum, Row a, Column b) { return multiply_add(a, b, sum); }
};

#ifdef FUSED_LSTM_DOT_BF16
// bfloat16 pairs along K, summed in float by vdpbf16ps.
struct MultiplyPairs {
  using Elem = BFloat16;
  using Panel = BFloat16;
  using Acc = float;
  static constexpr int kStepK = 2, kPadK = 2;
  static constexpr int64_t kSteps = kStretch;
  using Column = __m512bh;
  using Row = __m512bh;
  FUSED_LSTM_INLINE Column column(const Elem* p) { return load_raw<__m512bh>(p); }
  FUSED_LSTM_INLINE Row row(const Elem* p) {
    int pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FUSED_LSTM_INLINE Vec<float> add(Vec<float> sum, Row a, Column b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

// How a compute dtype is multiplied. Half, and bfloat16 without instructions of its own, are
// widened to float when they are packed: on processors that lack them that is faster than widening
// in the product.
template <class T>
struct DotOf {
  using type = Multiply<float, float>;
};
template <>
struct DotOf<double> {
  using type = Multiply<double, double>;
};

template <class A>
constexpr int kTileWidth = kMaxVectors * kLanes<A>;

// What a tile is computed from; K in steps of kStepK, the padding included.
template <class Elem, class A, class Panel = Elem>
struct Tile {
  const Elem* operand;
  int64_t stride, step;
  const Panel* panel;
  int64_t steps;
  const A* init;
  int64_t init_stride;
  A* out;
  const void* ahead = nullptr;  // of it a line is fetched at each step of K (kMayFetch)
};

template <class Dot>
using TileOf = Tile<typename Dot::Elem, typename Dot::Acc, typename Dot::Panel>;

template <int NV>
constexpr int kRowsFor = kRegisters == 32 ? (NV == 4   ? 6
                                             : NV == 3 ? 8
                                                       : 12)
                                          : (NV == 4   ? 3
                                             : NV == 3 ? 4
                                                       : 6);

// Keeps the compiler from loading a column anew for each row, as GCC 12 does for two and three: two
// rows of four vectors at 99 GFLOP/s, three at 102, with it 131 and 180 (AVX2, two rows: 67, 96). Of
// tiles that fill the registers it makes none faster.
template <class Column>
FUSED_LSTM_INLINE void in_register(Column& column) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Column, Vec<float>> || std::is_same_v<Column, Vec<double>>)
    asm("" : "+v"(column));
#endif
}

// Vectors of a panel that lie together.
constexpr int kPart = kRegisters == 16 ? 2 : kMaxVectors;

// `width`: vectors of the panel's part, of which these are some; what is beyond it is in the next.
template <class Dot, int MR, int NV, int width, bool fetch>
static __attribute__((noinline)) void vector_tile(const TileOf<Dot>& tile) {
  using Elem = typename Dot::Elem;
  using Panel = typename Dot::Panel;
  using A = typename Dot::Acc;
  constexpr int V = kLanes<A>;
  const Elem* operand = tile.operand;
  constexpr int here = NV < kPart ? NV : kPart;
  const Panel* panel = tile.panel;
  const Panel* next = panel + tile.steps * kPart * V * Dot::kStepK;
  const int64_t stride = tile.stride, step = tile.step;
  const A* before = tile.init;
  int64_t before_stride = tile.init_stride, left = tile.steps;
  const char* ahead = static_cast<const char*>(tile.ahead);
  do {
    Vec<A> sum[MR][NV] = {};
    for (int64_t k = left < Dot::kSteps ? left : Dot::kSteps; k > 0; --k) {
      typename Dot::Column b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        b[v] = Dot::column(v < here ? panel + v * V * Dot::kStepK
                                    : next + (v - here) * V * Dot::kStepK);
        if (MR > 1 && MR < kRowsFor<NV>) in_register(b[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        typename Dot::Row a = Dot::row(operand + r * stride);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = Dot::add(sum[r][v], a, b[v]);
      }
      if constexpr (fetch) {
        __builtin_prefetch(ahead, 0, 2);  // into the second-level cache
        ahead += kLine;
      }
      operand += step;
      panel += width * V * Dot::kStepK;
      if constexpr (NV > here) next += (NV - here) * V * Dot::kStepK;
    }
    left -= Dot::kSteps;
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        store(tile.out + r * kTileWidth<A> + v * V,
              load(before + r * before_stride + v * V) + sum[r][v]);
    before = tile.out;
    before_stride = kTileWidth<A>;
  } while (left > 0);
}

// Tiles of panels so wide fetch what they are told: those that are long enough to be far.
template <int width>
constexpr bool kMayFetch = width == kPart;

// From `least` rows on.
template <class Dot, int NV, int width = NV < kPart ? NV : kPart, int least = 1,
          int MR = kRowsFor<NV>>
FUSED_LSTM_INLINE void vector_rows(int rows, const TileOf<Dot>& tile) {
  if (rows == MR) {
    // A version of its own: two instructions a step of K cost 2 to 5 % where nothing is to fetch.
    constexpr bool may_fetch = kMayFetch<width>;
    if (may_fetch && tile.ahead) return vector_tile<Dot, MR, NV, width, may_fetch>(tile);
    return vector_tile<Dot, MR, NV, width, false>(tile);
  }
  if constexpr (MR > least) return vector_rows<Dot, NV, width, least, MR - 1>(rows, tile);
}

// Rows of a strip (packing.h), for which there is a tile of any number of vectors.
constexpr int kStripOf = 6;

// Three or four vectors; of more rows than a tile so wide has, in two parts.
template <class Dot, int NV>
FUSED_LSTM_INLINE void wide_rows(int rows, TileOf<Dot> tile) {
  constexpr int whole = kRowsFor<NV>, two = kLanes<typename Dot::Acc> * 2;
  if (rows <= whole) return vector_rows<Dot, NV>(rows, tile);
  if constexpr (NV == 4 || kStripOf > whole) {
    constexpr bool together = NV <= kPart;
    vector_rows<Dot, 2, together ? NV : 2, whole + 1>(rows, tile);
    tile.panel += two * Dot::kStepK * (together ? 1 : tile.steps);
    tile.init += two;
    tile.out += two;
    tile.ahead = nullptr;
    vector_rows<Dot, NV - 2, together ? NV : NV - 2, whole + 1>(rows, tile);
  }
}

// Rows of the next tile when `left` of them are to be cut into tiles of at most `most`: as even as
// can be, for a last tile of one or two rows waits for its panel, 256 bytes a step from the
// second-level cache, and takes as long as one of four.
FUSED_LSTM_INLINE int even_rows(int64_t left, int64_t most) {
  if (left <= most) return int(left);
  const int64_t tiles = (left + most - 1) / most;
  return int((left + tiles - 1) / tiles);
}

template <class Dot>
struct Product {
  using Elem = typename Dot::Elem;
  using Panel = typename Dot::Panel;
  using A = typename Dot::Acc;
  static constexpr int kStepK = Dot::kStepK, kPadK = Dot::kPadK;

  static int max_rows(int vectors) {
    return vectors == 4   ? kStripRows
           : vectors == 3 ? kRowsFor<3>
           : vectors == 2 ? kRowsFor<2>
                          : kRowsFor<1>;
  }
  // Two vectors at a time are also what serves 7 to 11 rows best, which would be two tiles; with
  // more, six rows of four are up to 5 % faster.
  static int next_rows(int64_t left, int vectors) {
    if (vectors == 4 && left < kRowsFor<2>) return int(left);
    return even_rows(left, max_rows(vectors));
  }
  static constexpr bool kFetches = true;  // a tile fetches what it is told (kMayFetch)
  // Called once by each thread of a pass, at its end (kernel.cpp).
  static void end() {}

  // Where in a panel of so many vectors and steps of K the columns of one of them begin at a step.
  static constexpr int64_t panel_at(int64_t step, int vector, int vectors, int64_t steps) {
    const int first = vector / kPart * kPart;
    const int width = vectors - first < kPart ? vectors - first : kPart;
    return (first * steps + step * width + vector - first) * kLanes<A> * kStepK;
  }

  // Columns of a dense matrix as a tile's operand, a strip of max_rows(4) of them at a time
  // (packing.h).
  static constexpr int kStripRows = kStripOf;
  static constexpr bool kStripIsTransposed = false;
  static constexpr int64_t strip_stride() { return kStepK; }
  static constexpr int64_t strip_step() { return kStripRows * kStepK; }

  static void run(int rows, int vectors, const TileOf<Dot>& tile) {
    switch (vectors) {
      case 4:
        return wide_rows<Dot, 4>(rows, tile);
      case 3:
        return wide_rows<Dot, 3>(rows, tile);
      case 2:
        return vector_rows<Dot, 2>(rows, tile);
      default:
        return vector_rows<Dot, 1>(rows, tile);
    }
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA

#include "product_amx.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct ProductOf {
  using type = Product<typename DotOf<T>::type>;
};
#if defined(FUSED_LSTM_TILE_BF16)
template <>
struct ProductOf<BFloat16> {
  using type = ProductAmx;
};
#elif defined(FUSED_LSTM_DOT_BF16)
template <>
struct ProductOf<BFloat16> {
  using type = Product<MultiplyPairs>;
};
#endif

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
