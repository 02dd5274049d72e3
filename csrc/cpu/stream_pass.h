// Steps of a stream: all layers of an LSTM, one direction, weights and states kept from call to
// call.
//
// Each thread owns a range of unit blocks (V hidden units with their four gates). Of a block lie
// side by side, in the order in which they are read, the rows of W_ih and of W_hh: one pass over
// memory a step, for all rows of the batch. Where FusedLSTM takes a single step's products from the
// weights as they lie (dense.h), so does the stream, from rows kept in that order, and elsewhere
// from panels, so that its results are FusedLSTM's to the bit. The threads meet after each layer.
//
// A layer's h_t is the operand of the layer above as it stands; h is kept twice, as in forward.h.
#pragma once

#include "cell.h"
#include "dense.h"
#include "product_narrow.h"
#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// What weights come in that are kept as Panel.
template <class Panel>
struct SourceOf {
  using type = Panel;
};
template <>
struct SourceOf<int8_t> {
  using type = float;
};

// T: the compute dtype. Gemm: the product, of operands Gemm::Elem with weights kept as Gemm::Panel.
template <class T, class Gemm>
struct StreamPass {
  using Elem = typename Gemm::Elem;
  using Panel = typename Gemm::Panel;
  using A = Acc<T>;
  static constexpr int V = kLanes<A>, kWidth = kTileWidth<A>;
  static constexpr bool kBytes = sizeof(Panel) == 1;
  static constexpr bool kAsStored = std::is_same_v<Elem, T>;  // operands may be taken as they lie
  static constexpr bool kAsGiven = std::is_same_v<Panel, T>;  // so are the weights kept
  using Source = typename SourceOf<Panel>::type;

  // One weight matrix: the panel of block b is panels + b * stride, a panel's scales are
  // scales + b * kWidth.
  struct Matrix {
    Panel* panels;
    int64_t stride, K, padded;
    float* scales;
    bool dense;
  };
  struct LayerWeights {
    Matrix ih, hh, hr;
    A* bias;  // (blocks, 4V)
  };
  struct LayerState {
    Elem* h[2];  // (B, h_stride)
    A* c;        // (B, c_stride)
  };
  // Rows of an operand, and the same quantised.
  struct Operand {
    const Elem* rows;
    int64_t stride;
    char* bytes = nullptr;
  };
  struct Private {
    A* sums;                  // (kMaxRows, 4V): one tile
    Elem* x;                  // (B, x_stride)
    char *x_bytes, *h_bytes;  // (B, row_bytes of the widest operand)
  };

  const StreamCall& call;
  const StreamShape& shape;
  int threads;
  int64_t blocks, projected_blocks, x_stride, h_stride, m_stride, c_stride, row_bytes;
  bool copy_input;
  Elem* unprojected;  // (B, m_stride): o tanh(c) when there is a projection
  char* private_base;
  int64_t private_bytes;
  Barriers barriers;  // one for the end, one after each layer

  StreamPass(const StreamCall* call, int, int threads)
      : call(*call), shape(call->shape), threads(threads) {
    constexpr int64_t line = kLine / int64_t(sizeof(Elem));
    blocks = (shape.H + V - 1) / V;
    projected_blocks = shape.projected ? (shape.P + kWidth - 1) / kWidth : 0;
    x_stride = round_up(padded(shape.I), line);
    h_stride = round_up(padded(shape.P), line);
    m_stride = round_up(padded(shape.H), line);
    c_stride = blocks * V;
    if (threads > blocks) this->threads = int(blocks);
    copy_input = kBytes || !kAsStored || padded(shape.I) != shape.I;
    if constexpr (kBytes) {
      const int64_t widest = x_stride > h_stride ? x_stride : h_stride;
      row_bytes = Gemm::row_bytes(widest > m_stride ? widest : m_stride);
    } else {
      row_bytes = 0;
    }
  }

  // --- where things lie --------------------------------------------------------------------------

  // K as whatever reads the operand may read it.
  static constexpr int64_t padded(int64_t K) {
    constexpr int64_t step = AlongK<T, Elem>::kStep;
    return round_up(K, step > Gemm::kPadK ? step : Gemm::kPadK);
  }

  // As FusedLSTM does it in float32 and float64, to have its bits. In 16 bits packed panels are as
  // fast or faster (8 rows, I 512, H 128 on AMX: 56 to 10 us) but for one row in bfloat16 pairs.
  static bool is_dense(const StreamShape& shape, int64_t I) {
    return kAsGiven && worth_dense<T, Elem>(shape.B, I + shape.P) &&
           (sizeof(T) > 2 || (shape.B == 1 && sizeof(Elem) == 2));
  }

  static Matrix matrix(int64_t K, bool dense) {
    return {nullptr, 0,    K, round_up(K, dense ? AlongK<T, Elem>::kStep : Gemm::kPadK),
            nullptr, dense};
  }

  static void take_scales(Arena& arena, Matrix& m, int64_t blocks) {
    if (kBytes) m.scales = arena.take<float>(blocks * kWidth);
  }

  LayerWeights layer_at(int64_t l, Arena& arena) const {
    const int64_t I = l ? shape.P : shape.I;
    const bool dense = is_dense(shape, I);
    LayerWeights w{matrix(I, dense), matrix(shape.P, dense), matrix(shape.H, false), nullptr};
    w.ih.stride = w.hh.stride = kWidth * (w.ih.padded + w.hh.padded);
    w.ih.panels = arena.take<Panel>(blocks * w.ih.stride);
    w.hh.panels = w.ih.panels + kWidth * w.ih.padded;
    w.bias = arena.take<A>(blocks * kWidth);
    take_scales(arena, w.ih, blocks);
    take_scales(arena, w.hh, blocks);
    w.hr.stride = kWidth * w.hr.padded;
    w.hr.panels = arena.take<Panel>(projected_blocks * w.hr.stride);
    take_scales(arena, w.hr, projected_blocks);
    return w;
  }

  // All layers but the first are of one shape.
  LayerWeights layer(int64_t l) const {
    Arena skipped{nullptr};
    if (l > 0) layer_at(0, skipped);
    if (l > 1) {
      Arena one{nullptr};
      layer_at(1, one);
      skipped.used += (l - 1) * one.used;
    }
    Arena arena{static_cast<char*>(call.weights), skipped.used};
    return layer_at(l, arena);
  }

  int64_t weight_bytes() const {
    Arena arena{nullptr};
    for (int64_t l = 0; l < shape.L; ++l) layer_at(l, arena);
    return arena.used;
  }

  int64_t h_count() const { return round_up(shape.B * h_stride * int64_t(sizeof(Elem)), kLine); }
  int64_t c_count() const { return round_up(shape.B * c_stride * int64_t(sizeof(A)), kLine); }
  int64_t state_bytes() const { return shape.L * (2 * h_count() + c_count()); }

  // At the call's step t: h[0] is the state before it, h[1] after it.
  LayerState state(int64_t l, int64_t t) const {
    char* base = static_cast<char*>(call.state) + l * (2 * h_count() + c_count());
    Elem* h[2] = {reinterpret_cast<Elem*>(base), reinterpret_cast<Elem*>(base + h_count())};
    const int now = int(call.current + t) % 2;
    return {{h[now], h[1 - now]}, reinterpret_cast<A*>(base + 2 * h_count())};
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 2);
    unprojected = arena.take<Elem>(shape.projected ? shape.B * m_stride : 0);
    const int64_t shared = arena.used;
    Arena one{nullptr};
    lay_out_private(one);
    private_bytes = round_up(one.used, 4096);  // a page apart: no two threads share a line
    private_base = static_cast<char*>(workspace) + shared;
    return shared + private_bytes * threads;
  }

  Private lay_out_private(Arena& arena) const {
    Private own;
    own.sums = arena.take<A>(kMaxRows * kWidth);
    own.x = arena.take<Elem>(copy_input ? shape.B * x_stride : 0);
    own.x_bytes = arena.take<char>(shape.B * row_bytes);
    own.h_bytes = arena.take<char>(shape.B * row_bytes);
    return own;
  }

  // --- weights and states in and out -------------------------------------------------------------

  void pack(int64_t l, const StreamWeights& given) const {
    const LayerWeights w = layer(l);
    for (int64_t block = 0; block < blocks; ++block) {
      const auto column = gate_column<V>(block * V, shape.H);
      pack_block(given.ih, w.ih, block, column);
      pack_block(given.hh, w.hh, block, column);
      add_biases<T>(given.bias_ih, given.bias_hh, column, w.bias + block * kWidth);
    }
    for (int64_t block = 0; block < projected_blocks; ++block)
      pack_block(given.hr, w.hr, block, [&](int n) {
        return block * kWidth + n < shape.P ? block * kWidth + n : int64_t(-1);
      });
  }

  template <class Column>
  static void pack_block(const void* given, const Matrix& m, int64_t block, const Column& column) {
    const Source* weights = static_cast<const Source*>(given);
    Panel* panel = m.panels + block * m.stride;
    if constexpr (kBytes) {
      Gemm::pack(weights, m.K, column, panel, m.scales + block * kWidth);
    } else if (m.dense) {
      pack_rows<AlongK<T, Elem>, V>(weights, m.K, m.padded, column, panel);
    } else {
      pack_dense_k<Gemm>(weights, m.K, m.K, kWidth, column, panel);
    }
  }

  // Rows [rows.begin, rows.end) of h (L, B, P) and c (L, B, H), or zeros.
  void write_state(const Range& rows, const T* h_0, const T* c_0) const {
    for (int64_t l = 0; l < shape.L; ++l)
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        const LayerState to = state(l, 0);
        Elem* h = to.h[0] + b * h_stride;
        A* c = to.c + b * c_stride;
        if (h_0) {
          copy_row(h_0 + (l * shape.B + b) * shape.P, shape.P, h, h_stride);
          copy_row(c_0 + (l * shape.B + b) * shape.H, shape.H, c, c_stride);
        } else {
          memset(h, 0, size_t(h_stride) * sizeof(Elem));
          memset(c, 0, size_t(c_stride) * sizeof(A));
        }
      }
  }

  void read_state(T* h_n, T* c_n) const {
    for (int64_t l = 0; l < shape.L; ++l)
      for (int64_t b = 0; b < shape.B; ++b) {
        const LayerState from = state(l, 0);
        read_row(from.h[0] + b * h_stride, shape.P, h_n + (l * shape.B + b) * shape.P);
        read_row(from.c + b * c_stride, shape.H, c_n + (l * shape.B + b) * shape.H);
      }
  }

  template <class From>
  static void read_row(const From* from, int64_t count, T* to) {
    if constexpr (std::is_same_v<From, T>) {
      memcpy(to, from, size_t(count) * sizeof(T));
    } else {
      for (int64_t u = 0; u < count; u += V)
        store_lanes<false>(to + u, load_lanes<From, false>(from + u, lanes_at<A>(u, count)),
                           lanes_at<A>(u, count));
    }
  }

  // --- steps -------------------------------------------------------------------------------------

  int team_size() const { return threads; }
  int64_t group_products() const { return call.T * shape.gate_products(); }

  void run(int thread) const {
    if (thread >= threads) return;
    Arena arena{private_base + thread * private_bytes};
    const Private own = lay_out_private(arena);
    Range mine = share(blocks, thread, threads),
          projected = share(projected_blocks, thread, threads);
    int meeting = threads;
    // What is beyond H in the operand of W_hr; the others read it after they have met.
    for (int64_t b = 0; thread == 0 && shape.projected && b < shape.B; ++b)
      memset(unprojected + b * m_stride + shape.H, 0, size_t(m_stride - shape.H) * sizeof(Elem));
    const auto goes_on = [&] {
      return meet(barriers[1], meeting, mine, blocks, projected, projected_blocks);
    };
    for (int64_t t = 0; t < call.T; ++t) {
      Operand x = input(t, own);
      for (int64_t l = 0; l < shape.L; ++l) {
        const LayerWeights w = layer(l);
        const LayerState at = state(l, t);
        T* y = l + 1 < shape.L ? nullptr : static_cast<T*>(call.y) + t * call.y_stride_t;
        const Operand h = quantised({at.h[0], h_stride, own.h_bytes}, shape.P);
        for (int64_t block = mine.begin; block < mine.end; ++block)
          hidden_block(w, at, block, x, h, y, own.sums);
        if (!goes_on()) return;
        if (shape.projected) {
          const Operand m = quantised({unprojected, m_stride, own.h_bytes}, shape.H);
          for (int64_t block = projected.begin; block < projected.end; ++block)
            projected_block(w, at, block, m, y, own.sums);
          if (!goes_on()) return;
        }
        x = quantised({at.h[1], h_stride, own.x_bytes}, l + 1 < shape.L ? shape.P : 0);
      }
    }
    Gemm::end();
  }

  Operand input(int64_t t, const Private& own) const {
    const T* x = static_cast<const T*>(call.x) + t * call.x_stride_t;
    if constexpr (kAsStored)
      if (!copy_input) return {reinterpret_cast<const Elem*>(x), call.x_stride_b};
    for (int64_t b = 0; b < shape.B; ++b)
      copy_row(x + b * call.x_stride_b, shape.I, own.x + b * x_stride, x_stride);
    return quantised({own.x, x_stride, own.x_bytes}, shape.I);
  }

  // The same operand with its K numbers a row quantised, where the product takes them so.
  Operand quantised(const Operand& operand, int64_t K) const {
    if constexpr (kBytes)
      for (int64_t b = 0; K > 0 && b < shape.B; ++b)
        Gemm::quantise(operand.rows + b * operand.stride, round_up(K, Gemm::kPadK),
                       operand.bytes + b * row_bytes);
    return operand;
  }

  // The sums of the four gates of a block, rows [b, b + rows).
  void gates(const LayerWeights& w, int64_t block, const Operand& x, const Operand& h, int64_t b,
             int rows, A* sums) const {
    const A* bias = w.bias + block * kWidth;
    if constexpr (kAsGiven)
      if (w.ih.dense)
        return dense_product<T, Elem>(
            rows,
            {V, bias, 0, sums, 2, {dense_part(w.ih, block, x, b), dense_part(w.hh, block, h, b)}});
    product(w.ih, block, x, b, rows, bias, 0, sums);
    product(w.hh, block, h, b, rows, sums, kWidth, sums);
  }

  static DensePart<T, Elem> dense_part(const Matrix& m, int64_t block, const Operand& operand,
                                       int64_t b) {
    return {m.panels + block * m.stride,
            0,
            V * m.padded,
            m.padded,
            operand.rows + b * operand.stride,
            operand.stride};
  }

  // sums = init + rows [b, b + rows) of the operand with a block of the matrix; init may be sums.
  void product(const Matrix& m, int64_t block, const Operand& operand, int64_t b, int rows,
               const A* init, int64_t init_stride, A* sums) const {
    const Panel* panel = m.panels + block * m.stride;
    const Elem* from = operand.rows + b * operand.stride;
    if constexpr (kBytes) {
      Gemm::run(rows, {operand.bytes + b * row_bytes, row_bytes, panel, m.padded / Gemm::kStepK,
                       m.scales + block * kWidth, init, init_stride, sums});
    } else {
      Gemm::run(rows, kMaxVectors,
                {from, operand.stride, Gemm::kStepK, panel, m.padded / Gemm::kStepK, init,
                 init_stride, sums});
    }
  }

  void hidden_block(const LayerWeights& w, const LayerState& at, int64_t block, const Operand& x,
                    const Operand& h, T* y, A* sums) const {
    const int64_t u = block * V;
    const int lanes = lanes_at<A>(u, shape.H);
    for (int64_t b = 0, m; b < shape.B; b += m) {
      m = Gemm::next_rows(shape.B - b, kMaxVectors);
      gates(w, block, x, h, b, int(m), sums);
      const auto save = [](int, const Vec<A>*, Vec<A>) {};
      const auto emit_row = [&](int r, Vec<A> hidden) __attribute__((always_inline)) {
        if (shape.projected) {
          store_operand<T, false>(unprojected + (b + r) * m_stride + u, hidden, lanes);
        } else {
          emit(at, b + r, u, lanes, hidden, y);
        }
      };
      update_cells(int(m), sums, at.c + b * c_stride + u, c_stride, save, emit_row);
    }
  }

  void projected_block(const LayerWeights& w, const LayerState& at, int64_t block, const Operand& m,
                       T* y, A* sums) const {
    static const A zeros[kWidth] = {};
    for (int64_t b = 0, rows; b < shape.B; b += rows) {
      rows = Gemm::next_rows(shape.B - b, kMaxVectors);
      product(w.hr, block, m, b, int(rows), zeros, 0, sums);
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kMaxVectors; ++v) {
          const int64_t u = block * kWidth + v * V;
          if (u < shape.P)
            emit(at, b + r, u, lanes_at<A>(u, shape.P), load(sums + r * kWidth + v * V), y);
        }
    }
  }

  // h_t, where the next step and the layer above, and of the last layer the caller, want it.
  void emit(const LayerState& at, int64_t b, int64_t u, int lanes, Vec<A> h, T* y) const {
    store_operand<T, false>(at.h[1] + b * h_stride + u, h, lanes);
    if (y) store_lanes<false>(y + b * call.y_stride_b + u, h, lanes);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
