// Steps of a stream: all layers of an LSTM, one direction, weights and states kept from call to
// call (stream_layout.h).
//
// Each thread owns a range of unit blocks, for all rows of the batch; they meet after each layer. A
// layer's h_t is the operand of the layer above as it stands; h is kept twice, as in forward.h. A
// stream of ids has after the last layer a head, and whoever called draws the next step's ids.
#pragma once

#include "cell.h"
#include "stream_layout.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// The cells of a tile, h in the place of its sums' first vectors: compiled once for all passes.
template <class A>
static __attribute__((noinline)) void update_in_place(int rows, A* sums, A* c, int64_t c_stride) {
  update_cells(
      rows, sums, c, c_stride, [](int, const Vec<A>*, Vec<A>) {},
      [&](int r, Vec<A> h) { store(sums + r * kTileWidth<A>, h); });
}

template <class T, class Gemm_>
struct StreamPass : StreamLayout<T, Gemm_> {
  using Gemm = Gemm_;
  using Layout = StreamLayout<T, Gemm>;
  using Layout::blocks;
  using Layout::call;
  using Layout::kBytes;
  using Layout::kMayBeDense;
  using Layout::kWidth;
  using Layout::shape;
  using Layout::V;
  using typename Layout::A;
  using typename Layout::Elem;
  using typename Layout::LayerState;
  using typename Layout::LayerWeights;
  using typename Layout::Matrix;
  using typename Layout::Panel;
  using typename Layout::Text;

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
  // One layer at one step.
  struct Layer {
    LayerWeights w;
    LayerState at;
    Operand x, h;
    const A* table;      // with ids: x W_ih^T + b of each id
    const int64_t* ids;  // (B); null: of x and the bias
    T* y;                // (B, P), or null
    A* sums;
  };

  int threads;
  int64_t row_bytes = 0;
  bool copy_input;
  Elem* unprojected;  // (B, m_stride): o tanh(c) when there is a projection
  double* scores;     // (B, V) of a head
  int* ended;         // the caller draws no more
  char* private_base;
  int64_t private_bytes;
  Barriers barriers;  // one for the end, one for all others

  StreamPass(const StreamCall* call, int, int wanted)
      : Layout(*call), threads(wanted > blocks ? int(blocks) : wanted) {
    copy_input = kBytes || !Layout::kAsStored || call->text || Layout::padded(shape.I) != shape.I;
    if constexpr (kBytes) {
      const int64_t wide = this->x_stride > this->h_stride ? this->x_stride : this->h_stride;
      row_bytes = Gemm::row_bytes(wide > this->m_stride ? wide : this->m_stride);
    }
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 2);
    unprojected = arena.take<Elem>(shape.projected ? shape.B * this->m_stride : 0);
    scores = arena.take<double>(call.text ? shape.B * call.text->vocabulary : 0);
    ended = arena.take<int>(1);
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
    own.x = arena.take<Elem>(copy_input ? shape.B * this->x_stride : 0);
    own.x_bytes = arena.take<char>(shape.B * row_bytes);
    own.h_bytes = arena.take<char>(shape.B * row_bytes);
    return own;
  }

  int team_size() const { return threads; }
  int64_t group_products() const { return call.T * shape.gate_products(); }

  void run(int thread) const {
    if (thread >= threads) return;
    Arena arena{private_base + thread * private_bytes};
    const Private own = lay_out_private(arena);
    if (thread == 0) prepare();
    int meeting = threads;  // 1: this one goes on alone
    const auto part = [&](int64_t count) {
      return meeting < threads ? Range{0, count} : share(count, thread, threads);
    };
    const auto goes_on = [&] {
      meeting = barriers[1].wait(meeting);
      return meeting > 0;
    };
    for (int64_t t = 0; t < call.T; ++t) {
      Operand x = input(t, own);
      for (int64_t l = 0; l < shape.L; ++l) {
        const Layer layer = layer_at_step(l, t, x, own);
        for (Range mine = part(blocks); !mine.empty(); ++mine.begin)
          hidden_block(layer, mine.begin);
        if (!goes_on()) return;
        if (shape.projected) {
          const Operand m = quantised({unprojected, this->m_stride, own.h_bytes}, shape.H);
          for (Range mine = part(this->projected_blocks); !mine.empty(); ++mine.begin)
            projected_block(layer, m, mine.begin);
          if (!goes_on()) return;
        }
        const bool is_read = l + 1 < shape.L || scores_after(t);
        x = quantised({layer.at.h[1], this->h_stride, own.x_bytes}, is_read ? shape.P : 0);
      }
      if (!scores_after(t)) continue;
      for (Range mine = part(this->head_blocks); !mine.empty(); ++mine.begin)
        head_block(x, mine.begin, own.sums);
      if (!goes_on()) return;
      if ((meeting < threads || thread == 0) && !call.text->draw(call.text->context, t, scores))
        *ended = 1;
      if (!goes_on()) return;
      if (*ended) break;
    }
  }

  // The others read it after they have met.
  void prepare() const {
    *ended = 0;
    for (int64_t b = 0; shape.projected && b < shape.B; ++b)
      memset(unprojected + b * this->m_stride + shape.H, 0,
             size_t(this->m_stride - shape.H) * sizeof(Elem));
  }

  bool scores_after(int64_t t) const { return call.text && t + 1 >= call.text->given; }

  __attribute__((noinline)) Layer layer_at_step(int64_t l, int64_t t, const Operand& x,
                                                const Private& own) const {
    Layer layer{this->layer(l), this->state(l, t), x, {}, nullptr, nullptr, nullptr, own.sums};
    layer.h = quantised({layer.at.h[0], this->h_stride, own.h_bytes}, shape.P);
    if (l == 0 && call.text && call.text->table) {
      layer.table = this->text().table;
      layer.ids = call.text->ids + t * shape.B;
    }
    if (l + 1 == shape.L && call.y) layer.y = static_cast<T*>(call.y) + t * call.y_stride_t;
    return layer;
  }

  // x_t, and where there is an embedding that of the ids.
  Operand input(int64_t t, const Private& own) const {
    const T* x = static_cast<const T*>(call.x) + t * call.x_stride_t;
    if constexpr (Layout::kAsStored)
      if (!copy_input) return {reinterpret_cast<const Elem*>(x), call.x_stride_b};
    const T* embedding = call.text && !call.text->table ? this->text().embedding : nullptr;
    for (int64_t b = 0; shape.I > 0 && b < shape.B; ++b)
      copy_row(embedding ? embedding + call.text->ids[t * shape.B + b] * shape.I
                         : x + b * call.x_stride_b,
               shape.I, own.x + b * this->x_stride, this->x_stride);
    return quantised({own.x, this->x_stride, own.x_bytes}, shape.I);
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
  void gates(const Layer& layer, int64_t block, int64_t b, int rows) const {
    const LayerWeights& w = layer.w;
    A* const sums = layer.sums;
    const A* init = w.bias + block * kWidth;
    int64_t init_stride = 0;
    if (layer.ids) {
      for (int r = 0; r < rows; ++r)
        memcpy(sums + r * kWidth, layer.table + (layer.ids[b + r] * blocks + block) * kWidth,
               kWidth * sizeof(A));
      init = sums;
      init_stride = kWidth;
    }
    if constexpr (kMayBeDense)
      if (w.hh.dense) {
        const DensePart<T, Elem> h = dense_part(w.hh, block, layer.h, b);
        if (layer.ids)
          return dense_product<true, T, Elem>(rows, {V, init, init_stride, sums, 1, {h}});
        const DensePart<T, Elem> x = dense_part(w.ih, block, layer.x, b);
        return dense_product<true, T, Elem>(rows, {V, init, init_stride, sums, 2, {x, h}});
      }
    if (!layer.ids) product(w.ih, block, layer.x, b, rows, init, 0, sums);
    product(w.hh, block, layer.h, b, rows, sums, kWidth, sums);
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

  __attribute__((noinline)) void hidden_block(const Layer& layer, int64_t block) const {
    const int64_t u = block * V;
    const int lanes = lanes_at<A>(u, shape.H);
    for (int64_t b = 0, m; b < shape.B; b += m) {
      m = Gemm::next_rows(shape.B - b, kMaxVectors);
      gates(layer, block, b, int(m));
      update_in_place(int(m), layer.sums, layer.at.c + b * this->c_stride + u, this->c_stride);
      for (int r = 0; r < m; ++r) {
        const Vec<A> hidden = load(layer.sums + r * kWidth);
        if (shape.projected)
          store_operand<T, false>(unprojected + (b + r) * this->m_stride + u, hidden, lanes);
        else
          emit(layer, b + r, u, lanes, hidden);
      }
    }
  }

  // A block of columns of a matrix that isn't the gates': each(row, column, vector, lanes).
  template <class Each>
  void columns(const Matrix& m, int64_t block, const Operand& operand, const A* init, A* sums,
               int64_t count, const Each& each) const {
    for (int64_t b = 0, rows; b < shape.B; b += rows) {
      rows = Gemm::next_rows(shape.B - b, kMaxVectors);
      product(m, block, operand, b, int(rows), init, 0, sums);
      for (int r = 0; r < rows; ++r)
        for (int64_t v = 0, u = block * kWidth; v < kMaxVectors && u < count; ++v, u += V)
          each(b + r, u, load(sums + r * kWidth + v * V), lanes_at<A>(u, count));
    }
  }

  void projected_block(const Layer& layer, const Operand& m, int64_t block) const {
    static const A zeros[kWidth] = {};
    columns(layer.w.hr, block, m, zeros, layer.sums, shape.P,
            [&](int64_t b, int64_t u, Vec<A> h, int lanes) { emit(layer, b, u, lanes, h); });
  }

  void head_block(const Operand& y, int64_t block, A* sums) const {
    const Text text = this->text();
    const int64_t vocabulary = call.text->vocabulary;
    columns(text.head, block, y, text.bias + block * kWidth, sums, vocabulary,
            [&](int64_t b, int64_t id, Vec<A> of, int lanes) {
              for (int l = 0; l < lanes; ++l) scores[b * vocabulary + id + l] = of[l];
            });
  }

  // h_t, where the next step and the layer above, and of the last layer the caller, want it.
  void emit(const Layer& layer, int64_t b, int64_t u, int lanes, Vec<A> h) const {
    store_operand<T, false>(layer.at.h[1] + b * this->h_stride + u, h, lanes);
    if (layer.y) store_lanes<false>(layer.y + b * call.y_stride_b + u, h, lanes);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
