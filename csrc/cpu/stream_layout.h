// Where a stream keeps its weights and states, and how they get in and out.
//
// Of a block of units (V of them with their four gates) lie side by side, in the order in which they
// are read, the rows of W_ih and of W_hh: one pass over memory a step. Where FusedLSTM takes a single
// step's products from the weights as they lie (dense.h), they are rows in that order, and elsewhere
// panels, so that a stream's results are FusedLSTM's to the bit.
#pragma once

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

// T: the compute dtype. Gemm: the product, of operands Gemm::Elem with weights that are kept as Gemm::Panel.
template <class T, class Gemm>
struct StreamLayout {
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
  // What gives and takes ids has a table of x W_ih^T + b of each id, (V, blocks, 4V), or an embedding
  // (V, I), and a head of V rows.
  struct Text {
    Matrix head;
    A* bias;  // (head_blocks, 4V)
    A* table;
    T* embedding;
  };

  const StreamCall& call;
  const StreamShape& shape;
  int64_t blocks, projected_blocks, head_blocks, x_stride, h_stride, m_stride, c_stride;

  explicit StreamLayout(const StreamCall& call) : call(call), shape(call.shape) {
    constexpr int64_t line = kLine / int64_t(sizeof(Elem));
    blocks = (shape.H + V - 1) / V;
    projected_blocks = shape.projected ? (shape.P + kWidth - 1) / kWidth : 0;
    head_blocks = call.text ? (call.text->vocabulary + kWidth - 1) / kWidth : 0;
    x_stride = round_up(padded(shape.I), line);
    h_stride = round_up(padded(shape.P), line);
    m_stride = round_up(padded(shape.H), line);
    c_stride = blocks * V;
  }

  // K as whatever reads the operand may read it.
  static constexpr int64_t padded(int64_t K) {
    constexpr int64_t step = AlongK<T, Elem>::kStep;
    return round_up(K, step > Gemm::kPadK ? step : Gemm::kPadK);
  }

  // As FusedLSTM does it in float32 and float64, to have its bits. In 16 bits packed panels are as
  // fast or faster (8 rows, I 512, H 128 on AMX: 56 to 10 us) but for one row in bfloat16 pairs.
  static constexpr bool kMayBeDense = kAsGiven && (sizeof(T) > 2 || sizeof(Elem) == 2);
  static bool is_dense(const StreamShape& shape, int64_t I) {
    return kMayBeDense && worth_dense<T, Elem>(shape.B, I + shape.P) &&
           (sizeof(T) > 2 || shape.B == 1);
  }

  static Matrix matrix(int64_t K, bool dense) {
    return {nullptr, 0,    K, round_up(K, dense ? AlongK<T, Elem>::kStep : Gemm::kPadK),
            nullptr, dense};
  }

  static void take_scales(Arena& arena, Matrix& m, int64_t blocks) {
    if (kBytes) m.scales = arena.take<float>(blocks * kWidth);
  }

  __attribute__((noinline)) LayerWeights layer_at(int64_t l, Arena& arena) const {
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

  __attribute__((noinline)) Text text_at(Arena& arena) const {
    const StreamText& given = *call.text;
    Text text{matrix(shape.P, false), nullptr, nullptr, nullptr};
    text.head.stride = kWidth * text.head.padded;
    text.head.panels = arena.take<Panel>(head_blocks * text.head.stride);
    text.bias = arena.take<A>(head_blocks * kWidth);
    take_scales(arena, text.head, head_blocks);
    text.table = arena.take<A>(given.table ? given.vocabulary * blocks * kWidth : 0);
    text.embedding = arena.take<T>(given.table ? 0 : given.vocabulary * shape.I);
    return text;
  }

  Text text() const {
    Arena arena{static_cast<char*>(call.text->kept)};
    return text_at(arena);
  }

  int64_t text_bytes() const {
    Arena arena{nullptr};
    text_at(arena);
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

  void pack(int64_t l, const StreamWeights& given) const {
    const LayerWeights w = layer(l);
    for (int64_t block = 0; block < blocks; ++block) {
      const auto column = gate_column<V>(block * V, shape.H);
      pack_block(given.ih, w.ih, block, column);
      pack_block(given.hh, w.hh, block, column);
      add_biases<T>(given.bias_ih, given.bias_hh, column, w.bias + block * kWidth);
    }
    pack_matrix(given.hr, w.hr, projected_blocks, shape.P);
  }

  void pack_text(const StreamTextWeights& given) const {
    const Text kept = text();
    const int64_t vocabulary = call.text->vocabulary;
    pack_matrix(given.head, kept.head, head_blocks, vocabulary);
    for (int64_t n = 0; n < head_blocks * kWidth; ++n)
      kept.bias[n] =
          n < vocabulary && given.bias ? A(to_acc(static_cast<const T*>(given.bias)[n])) : A(0);
    const A* table = static_cast<const A*>(given.table);
    for (int64_t id = 0; table && id < vocabulary; ++id)
      for (int64_t block = 0; block < blocks; ++block)
        for (int n = 0; n < kWidth; ++n) {
          const int64_t row = gate_column<V>(block * V, shape.H)(n);
          kept.table[(id * blocks + block) * kWidth + n] =
              row < 0 ? A(0) : table[id * 4 * shape.H + row];
        }
    if (given.embedding)
      memcpy(kept.embedding, given.embedding, size_t(vocabulary * shape.I) * sizeof(T));
  }

  // A matrix of so many rows, one after the other: as one gate's, in blocks of a panel's width.
  static void pack_matrix(const void* given, const Matrix& m, int64_t blocks, int64_t rows) {
    for (int64_t block = 0; block < blocks; ++block)
      pack_block(given, m, block, gate_column<kWidth>(block * kWidth, rows));
  }

  template <class Column>
  static __attribute__((noinline)) void pack_block(const void* given, const Matrix& m,
                                                   int64_t block, const Column& column) {
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

  void read_state(const Range& rows, T* h_n, T* c_n) const {
    for (int64_t l = 0; l < shape.L; ++l)
      for (int64_t b = rows.begin; b < rows.end; ++b) {
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
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
