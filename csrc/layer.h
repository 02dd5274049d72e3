// One layer's operands as the operators receive them, checked once for every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dtypes.h"

namespace fused_lstm {

struct Weights {  // of one direction; undefined where absent
  at::Tensor ih, hh, bias_ih, bias_hh, hr;
};

// Shapes are in lstm.h. Raises RuntimeError on what the module's own checks would not have let
// through.
struct Layer {
  int64_t T, B, I, H, P, N, directions;
  bool packed, biased, projected;
  bool ids;                                   // in place of one-hot rows
  std::vector<int64_t> batch_sizes, offsets;  // empty when not packed
  std::vector<Weights> weights;

  Layer(const at::Tensor& input, const std::optional<at::Tensor>& sizes, const at::Tensor& h_0,
        const at::Tensor& c_0, at::TensorList flat_weights) {
    packed = sizes.has_value() && sizes->defined();
    ids = input.scalar_type() == at::kLong;
    directions = h_0.dim() == 3 ? h_0.size(0) : 0;
    TORCH_CHECK(directions == 1 || directions == 2,
                "fused_lstm: h_0 must be (1 or 2 directions, B, P), got ", h_0.sizes());
    const int64_t each = int64_t(flat_weights.size()) / directions;
    TORCH_CHECK(each >= 2 && each <= 5 && each * directions == int64_t(flat_weights.size()),
                "fused_lstm: expected 2 to 5 weights a direction, got ", flat_weights.size(),
                " for ", directions, " directions");
    biased = each >= 4;
    projected = each == 3 || each == 5;
    for (int64_t d = 0; d < directions; ++d) {
      const at::Tensor* w = flat_weights.data() + d * each;
      weights.push_back({w[0], w[1], biased ? w[2] : at::Tensor(), biased ? w[3] : at::Tensor(),
                         projected ? w[each - 1] : at::Tensor()});
    }
    B = h_0.size(1);
    P = h_0.size(2);
    TORCH_CHECK(weights[0].ih.dim() == 2 && weights[0].ih.size(0) % 4 == 0,
                "fused_lstm: weight_ih must be (4H, I), got ", weights[0].ih.sizes());
    H = weights[0].ih.size(0) / 4;
    I = weights[0].ih.size(1);
    TORCH_CHECK(projected || P == H, "fused_lstm: h_0 must have H = ", H, " columns, got ", P);
    const at::Tensor& like = ids ? h_0 : input;
    check(c_0, "c_0", {directions, B, H}, like);
    check(h_0, "h_0", {directions, B, P}, like);
    for (const Weights& w : weights) {
      check(w.ih, "weight_ih", {4 * H, I}, like,
            ids ? sums_of(like.scalar_type()) : like.scalar_type());
      check(w.hh, "weight_hh", {4 * H, P}, like);
      if (biased) check(w.bias_ih, "bias_ih", {4 * H}, like);
      if (biased) check(w.bias_hh, "bias_hh", {4 * H}, like);
      if (projected) check(w.hr, "weight_hr", {P, H}, like);
    }
    if (packed) {
      read_batch_sizes(*sizes);
      check_input(input, {N});
    } else {
      TORCH_CHECK(input.dim() == (ids ? 2 : 3), "fused_lstm: input must be (T, B, I), or ids (T, ",
                  "B), got ", input.sizes());
      T = input.size(0);
      N = T * B;
      check_input(input, {T, B});
    }
    TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  }

  // Raises RuntimeError where a tensor is not of this shape, or not of the dtype and device of
  // another: the input, or h_0 where there are ids.
  static void check(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                    const at::Tensor& like) {
    check(tensor, name, shape, like, like.scalar_type());
  }
  // The same, but for the dtype: that of a table of sums (cpu/table.h), where there are ids.
  static void check(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                    const at::Tensor& like, at::ScalarType dtype) {
    TORCH_CHECK(tensor.sizes() == shape, "fused_lstm: expected ", name, " of shape ", shape,
                ", got ", tensor.sizes());
    TORCH_CHECK(tensor.scalar_type() == dtype, "fused_lstm: ", name, " is ", tensor.scalar_type(),
                " but ", dtype == like.scalar_type() ? "input is " : "with ids must be ", dtype,
                ": convert one of them");
    TORCH_CHECK(tensor.device() == like.device(), "fused_lstm: ", name, " is on ", tensor.device(),
                " but input is on ", like.device(), ": move one of them");
  }

 private:
  // rows: the shape of ids; of an input, but for I.
  void check_input(const at::Tensor& input, std::vector<int64_t> rows) const {
    if (!ids) rows.push_back(I);
    check(input, "input", rows, input);
    TORCH_CHECK(!ids || input.is_cpu(), "fused_lstm: ids go in on CPUs only, and are on ",
                input.device(), ": give their rows");
  }

  void read_batch_sizes(const at::Tensor& sizes) {
    TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.is_cpu(),
                "fused_lstm: batch_sizes must be a 1-D int64 tensor on the CPU");
    T = sizes.size(0);
    N = 0;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t rows = sizes.data_ptr<int64_t>()[t * sizes.stride(0)];
      TORCH_CHECK(rows > 0 && rows <= (t ? batch_sizes.back() : B),
                  "fused_lstm: batch_sizes must start at ", B,
                  " (the states' batch), stay positive and never increase; step ", t, " has ",
                  rows);
      batch_sizes.push_back(rows);
      offsets.push_back(N);
      N += rows;
    }
    TORCH_CHECK(T == 0 || batch_sizes[0] == B, "fused_lstm: batch_sizes starts at ",
                T ? batch_sizes[0] : 0, " but the states have a batch of ", B);
  }
};

}  // namespace fused_lstm
