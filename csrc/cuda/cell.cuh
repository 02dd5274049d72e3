// One cell of the LSTM, and the gradient through it: the equations of ../lstm.h, in float or
// double. kFast as in activations.cuh.
#pragma once

#include "activations.cuh"

namespace fused_lstm::cuda {

template <class Real>
struct Cell {
  Real gate[4];  // activated, in the order i, f, g, o
  Real c, h;
};

// From the gates' sums before their activation.
template <bool kFast, class Real>
FUSED_LSTM_DEVICE Cell<Real> update_cell(const Real (&sum)[4], Real c_before) {
  Cell<Real> cell;
  cell.gate[0] = sigmoid<kFast>(sum[0]);
  cell.gate[1] = sigmoid<kFast>(sum[1]);
  cell.gate[2] = tanh<kFast>(sum[2]);
  cell.gate[3] = sigmoid<kFast>(sum[3]);
  cell.c = cell.gate[1] * c_before + cell.gate[0] * cell.gate[2];
  cell.h = cell.gate[3] * tanh<kFast>(cell.c);
  return cell;
}

// What the gradients of one cell are multiples of: all that does not wait for dh.
template <class Real>
struct CellSlopes {
  Real gate[4];  // of the sums before the activation: i, f and g by dc, o by dh
  Real c;        // what dh adds to dc
  Real forget;   // of c_before, by dc
  Real hidden;   // o tanh(c): what h was before it was rounded
};

// `gate` and c are what update_cell found.
template <bool kFast, class Real>
FUSED_LSTM_DEVICE CellSlopes<Real> cell_slopes(const Real (&gate)[4], Real c, Real c_before) {
  const Real in = gate[0], forget = gate[1], candidate = gate[2], out = gate[3];
  const Real tanh_c = tanh<kFast>(c);
  return {{candidate * in * (1 - in), c_before * forget * (1 - forget),
           in * (1 - candidate * candidate), tanh_c * out * (1 - out)},
          out * (1 - tanh_c * tanh_c),
          forget,
          out * tanh_c};
}

template <class Real>
struct CellGradient {
  Real gate[4];    // of the sums before the activation
  Real dc_before;  // of c_before
};

// From dh, the whole gradient of h, and dc, that of c but for what comes by way of h.
template <class Real>
FUSED_LSTM_DEVICE CellGradient<Real> cell_gradient(const CellSlopes<Real>& slopes, Real dh,
                                                   Real dc) {
  const Real dc_t = dc + dh * slopes.c;
  return {
      {dc_t * slopes.gate[0], dc_t * slopes.gate[1], dc_t * slopes.gate[2], dh * slopes.gate[3]},
      dc_t * slopes.forget};
}

}  // namespace fused_lstm::cuda
