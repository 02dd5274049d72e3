#include "products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/sum.h>

namespace fused_lstm {
namespace {

// The rows in which the sequences of a packed batch start, sequence after sequence.
std::vector<RowRun> starting_rows(const Sequence& seq) {
  std::vector<RowRun> runs;
  for (int64_t s = 0; s < seq.T; ++s) {
    const int64_t t = seq.step(s, false), continued = seq.continued(t);
    if (seq.rows(t) > continued)
      runs.push_back({int32_t(seq.rows(t) - continued), int32_t(seq.first_row(t) + continued)});
  }
  return runs;
}

// For each row, in order, the row of the step before; for a row that starts a sequence, itself.
std::vector<RowRun> rows_before(const Sequence& seq) {
  std::vector<RowRun> runs;
  for (int64_t t = 0; t < seq.T; ++t) {
    const int64_t continued = seq.continued(t), started = seq.rows(t) - continued;
    if (continued > 0) runs.push_back({int32_t(continued), int32_t(seq.first_row(seq.before(t)))});
    if (started > 0) runs.push_back({int32_t(started), int32_t(seq.first_row(t) + continued)});
  }
  return runs;
}

// The rows of all runs, one after another, (total) int32 on the device. Nothing waits for it.
at::Tensor rows_of_runs(std::vector<RowRun> runs, int64_t total, const Upload& upload) {
  int32_t end = 0;
  for (RowRun& run : runs) {
    run.first -= end;
    end += run.count;
  }
  const at::Tensor on_device = upload(runs);
  const std::optional<int64_t> known = total;  // or it would wait for the sum of the counts
  const at::Tensor run = at::repeat_interleave(on_device.select(1, 0), known);
  return on_device.select(1, 1).index_select(0, run).add_(at::arange(total, on_device.options()));
}

}  // namespace

at::Tensor rows_of(const LayerCall& call) {
  TORCH_CHECK(!call.layer.ids, "fused_lstm: this backend takes no ids: give their rows");
  return call.input.reshape({call.layer.N, call.layer.I});
}

Products::Products(const BackwardCall& call, int64_t d, const at::Tensor& dgates,
                   const Upload& upload)
    : call_(call),
      layer_(call.layer),
      w_(call.layer.weights[d]),
      d_(d),
      U_(dgates.size(2)),
      dgates_(dgates.view({call.layer.N, 4 * U_})),
      upload_(upload) {
  if (layer_.packed && (call_.needs[1] || wanted(1)))
    starts_ = rows_of_runs(starting_rows(sequence_of(layer_, d_)), layer_.B, upload_);
}

void Products::compute(const at::Tensor& x, LayerGradients& grads) const {
  if (call_.needs[0]) to_input(grads.input);
  if (call_.needs[1]) to_h_0(grads.h_0.select(0, d_));
  if (wanted(0)) fill(gradient(grads, 0), [&](at::Tensor sum) { at::mm_out(sum, dgates_.t(), x); });
  if (wanted(1)) fill(gradient(grads, 1), [&](at::Tensor sum) { to_weight_hh(sum); });
  if (!layer_.biased || !(wanted(2) || wanted(3))) return;
  // either bias vector's: both are added to the gates
  fill(gradient(grads, wanted(2) ? 2 : 3), [&](at::Tensor sum) { at::sum_out(sum, dgates_, {0}); });
  if (wanted(2) && wanted(3)) gradient(grads, 3).copy_(gradient(grads, 2));
}

void Products::to_weight_hr(const at::Tensor& grad_projected, const at::Tensor& hidden,
                            LayerGradients& grads) const {
  const int64_t last = call_.each - 1;
  if (wanted(last)) at::mm_out(gradient(grads, last), grad_projected.t(), hidden);
}

// A weight's rows (4H, ...) with zeros between, as dgates' columns are.
at::Tensor Products::spread(const at::Tensor& w) const {
  if (U_ == layer_.H) return w;
  return at::constant_pad_nd(w.view({4, layer_.H, -1}), {0, 0, 0, U_ - layer_.H})
      .view({4 * U_, -1});
}

// grad (4H, ...) = what compute(sum) puts into sum (4U, ...).
template <class Compute>
void Products::fill(const at::Tensor& grad, const Compute& compute) const {
  if (U_ == layer_.H) return compute(grad);
  std::vector<int64_t> shape = grad.sizes().vec();
  shape[0] = 4 * U_;
  const at::Tensor sum = at::empty(shape, call_.options);
  compute(sum);
  grad.view({4, layer_.H, -1}).copy_(sum.view({4, U_, -1}).narrow(1, 0, layer_.H));
}

void Products::to_input(const at::Tensor& grad) const {
  at::Tensor dx = grad.view({layer_.N, layer_.I});
  if (d_ == 0)
    at::mm_out(dx, dgates_, spread(w_.ih));
  else
    at::addmm_out(dx, dx, dgates_, spread(w_.ih));
}

void Products::to_h_0(at::Tensor grad) const {
  const int64_t first = d_ == 0 ? 0 : layer_.N - layer_.B;
  const at::Tensor starts =
      layer_.packed ? dgates_.index_select(0, starts_) : dgates_.narrow(0, first, layer_.B);
  at::mm_out(grad, starts, spread(w_.hh));
}

// dgates^T times the states that the steps began with. Not packed, those are the output's rows of
// the neighbouring step, and h_0.
void Products::to_weight_hh(at::Tensor sum) const {
  const int64_t N = layer_.N, B = layer_.B, P = layer_.P;
  const at::Tensor h_0 = call_.h_0.select(0, d_);
  const at::Tensor output = call_.output.view({N, layer_.directions * P}).narrow(1, d_ * P, P);
  if (layer_.packed) {
    const std::vector<RowRun> before = rows_before(sequence_of(layer_, d_));
    const at::Tensor states = output.index_select(0, rows_of_runs(before, N, upload_));
    states.index_copy_(0, starts_.to(at::kLong), h_0);
    at::mm_out(sum, dgates_.t(), states);
    return;
  }
  const int64_t start = d_ == 0 ? 0 : N - B, others = d_ == 0 ? B : 0;
  at::mm_out(sum, dgates_.narrow(0, start, B).t(), h_0);
  if (N > B)
    at::addmm_out(sum, sum, dgates_.narrow(0, others, N - B).t(),
                  output.narrow(0, B - others, N - B));
}

}  // namespace fused_lstm
