// How the forward of one layer is laid out: padded sizes, what is taken at once, and the team.
#pragma once

#include "team.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// Bytes of W_ih above which it is worth reading it less often than at every step.
constexpr int64_t kFarBytes = 8 * kCacheBytes;
constexpr int64_t kRowsAhead = 128;  // of x taken together then, or where a step has few

// What the plan must know of the product and of the dtype.
struct ForwardKind {
  int V;              // units of a block
  int64_t pad;        // K is a multiple of it
  int64_t tile_rows;  // of a tile of four vectors
  int64_t element_bytes;
  int64_t fewest_products;  // kSharedProducts
  bool as_stored;           // operands may be taken as they lie
  bool dense;               // nothing is packed: dense.h
};

struct ForwardPlan {
  Sequence seq;
  int directions;
  Team team;
  ColumnBlocks projection;
  int64_t blocks, x_padded, h_padded, m_padded, x_stride, h_stride, m_stride, c_stride;
  int64_t chunk_rows, chunk_steps;
  bool copy_input, dense, ahead;  // ahead: x W_ih^T of a chunk before its first step
  bool at_once;                   // one dense step: x and h in one sum
  bool far;                       // W_hh is beyond the second-level cache
  bool few;                       // rows in a step: a panel of W_ih serves too little
  int slots;                      // chunks that a group of threads has in work

  ForwardPlan() = default;
  // most_steps: of a chunk; with it, one chunk's inputs are taken while another is in work.
  ForwardPlan(const Sequence& seq, int directions, int threads, const ForwardKind& kind,
              int64_t most_steps = 0)
      : seq(seq), directions(directions), dense(kind.dense), slots(most_steps ? 2 : 1) {
    blocks = (seq.H + kind.V - 1) / kind.V;
    x_padded = round_up(seq.multiplied(), kind.pad);
    h_padded = round_up(seq.P, kind.pad);
    m_padded = round_up(seq.H, kind.pad);
    const int64_t line = 64 / kind.element_bytes;
    x_stride = round_up(x_padded, line);
    h_stride = round_up(h_padded, line);
    m_stride = round_up(m_padded, line);
    c_stride = blocks * kind.V;
    const auto is_few = [&](int64_t rows) { return rows < 2 * kind.tile_rows; };
    few = is_few(seq.B);
    // Of few rows, x W_ih^T is taken ahead, and W_ih read but once in many steps.
    const int64_t kept = 4 * seq.H * (h_padded + (few ? 0 : x_padded)) * kind.element_bytes;
    team = Team::choose(threads, directions, seq,
                        {products() / seq.T, kind.fewest_products, kept, kind.tile_rows, blocks});
    projection = ColumnBlocks(seq.projected ? seq.P : 0, kind.V, team.unit_groups);
    const int64_t rows = (seq.B + team.row_groups - 1) / team.row_groups;
    const bool far_input = 4 * seq.H * x_padded * kind.element_bytes > kFarBytes;
    const bool wants_more = is_few(rows) || (far_input && 2 * rows <= kRowsAhead);
    chunk_steps = dense ? seq.T : wants_more ? kRowsAhead / rows : 1;
    if (chunk_steps > seq.T) chunk_steps = seq.T;
    if (most_steps && chunk_steps > most_steps) chunk_steps = most_steps;
    chunk_rows = rows * chunk_steps;
    at_once = dense && seq.T == 1 && !seq.ids;
    ahead = !seq.ids && ((dense && !at_once) || chunk_steps > 1);
    far = !dense && 4 * seq.H * h_padded * kind.element_bytes > kNearBytes * team.unit_groups;
    copy_input = !seq.ids && (dense || ahead || !kind.as_stored || x_padded != seq.I);
  }

  int64_t products() const { return seq.T * seq.B * 4 * seq.H * (x_padded + h_padded); }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
