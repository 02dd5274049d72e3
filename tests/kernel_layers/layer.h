// A layer put through one set of CPU kernels: forward, backward and gradients, without torch. Each
// operand and result is a block of the heap of its own, so that AddressSanitizer sees the end of
// each.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

namespace kernel_layers {

using namespace fused_lstm;

inline size_t element_bytes(Dtype dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// One tensor.
struct Buffer {
  Dtype dtype;
  int64_t count;
  std::unique_ptr<char[]> bytes;

  Buffer(Dtype dtype, int64_t count)
      : dtype(dtype), count(count), bytes(new char[size_t(count) * element_bytes(dtype)]()) {}

  char* at(int64_t index) { return bytes.get() + size_t(index) * element_bytes(dtype); }
  const char* at(int64_t index) const { return bytes.get() + size_t(index) * element_bytes(dtype); }

  // 16-bit values are cut off, not rounded: any value will do.
  void set(int64_t index, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == kFloat64) {
      const double wide = value;
      std::memcpy(at(index), &wide, 8);
    } else if (dtype == kFloat32) {
      std::memcpy(at(index), &value, 4);
    } else {
      const int exponent = int(bits >> 23 & 0xff) - 127 + 15;
      const uint16_t half = exponent <= 0
                                ? 0
                                : uint16_t(bits >> 16 & 0x8000) | uint16_t(exponent << 10) |
                                      uint16_t(bits >> 13 & 0x3ff);
      const uint16_t stored = dtype == kBFloat16 ? uint16_t(bits >> 16) : half;
      std::memcpy(at(index), &stored, 2);
    }
  }

  double get(int64_t index) const {
    if (dtype == kFloat64) return read<double>(index);
    if (dtype == kFloat32) return read<float>(index);
    const uint16_t bits = read<uint16_t>(index);
    if (dtype == kFloat16) {
      const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
      const double sign = bits & 0x8000 ? -1 : 1;
      if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
      return sign *
             (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
    }
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }

 private:
  template <class T>
  T read(int64_t index) const {
    T value;
    std::memcpy(&value, at(index), sizeof(T));
    return value;
  }
};

struct Case {
  int64_t T, B, I, H, P;
  bool packed, projected;
  int directions, threads;
  bool forward_only = false;
  std::vector<int64_t> sizes = {};  // of the batch at each step, packed; empty: some that shrink
  bool patient = true;              // the crew's
  bool ids = false;                 // in place of one-hot rows
};

struct Outcome {
  std::vector<Buffer> buffers;
};

// fill(buffer, scale) fills one operand after another, with numbers of about that scale.
template <class Fill>
Outcome run_with(const cpu::Kernel& kernel, Dtype dtype, const Case& c, Fill&& fill) {
  auto data = [&](int64_t count, float scale) {
    Buffer b(dtype, count);
    fill(b, scale);
    return b;
  };
  std::vector<int64_t> sizes = c.sizes, offsets;
  int64_t N = 0;
  for (int64_t t = 0; t < c.T; ++t) {
    if (c.sizes.empty()) sizes.push_back(c.packed ? c.B - t * (c.B - 1) / c.T : c.B);
    offsets.push_back(N);
    N += sizes[size_t(t)];
  }
  const int64_t D = c.directions, H = c.H, P = c.P;
  std::vector<int64_t> ids;
  if (c.ids)
    for (int64_t n = 0; n < N; ++n) ids.push_back(n * n % c.I);
  const float scale = 1.0f / std::sqrt(float(H));
  const Buffer input = data(N * c.I, 1), grad_output = data(N * D * P, 1);
  // W_ih is of sums where there are ids.
  const Dtype of_w_ih = ids.empty() || dtype == kFloat64 ? dtype : kFloat32;
  Outcome outcome;
  auto out_of = [&](Dtype type, int64_t count) {
    outcome.buffers.emplace_back(type, count);
    return outcome.buffers.size() - 1;
  };
  auto out = [&](int64_t count) { return out_of(dtype, count); };
  const size_t output = out(N * D * P), grad_input = out(N * c.I);
  std::vector<Buffer> constants;
  constants.reserve(64);
  auto constant_of = [&](Dtype type, int64_t count, float s) {
    constants.emplace_back(type, count);
    fill(constants.back(), s);
    return static_cast<const void*>(constants.back().at(0));
  };
  auto constant = [&](int64_t count, float s) { return constant_of(dtype, count, s); };
  Forward forward[2];
  Backward backward[2];
  Gradients gradients[2];
  std::vector<std::vector<size_t>> places;
  for (int64_t d = 0; d < D; ++d)
    places.push_back({out(c.B * P), out(c.B * H), out(N * 4 * H), out(N * H), out(N * 4 * H),
                      out(c.B * P), out(c.B * H), out(c.projected ? N * H : 0),
                      out(c.projected ? N * P : 0), out_of(of_w_ih, 4 * H * c.I), out(4 * H * P),
                      out(4 * H), out(c.projected ? P * H : 0)});
  for (int64_t d = 0; d < D; ++d) {
    auto at = [&](int i) {
      return static_cast<void*>(outcome.buffers[places[size_t(d)][size_t(i)]].at(0));
    };
    const Sequence seq = {c.T,
                          c.B,
                          c.I,
                          H,
                          P,
                          c.packed ? sizes.data() : nullptr,
                          c.packed ? offsets.data() : nullptr,
                          d == 1,
                          c.projected,
                          ids.empty() ? nullptr : ids.data()};
    const void* const x = seq.ids ? nullptr : input.at(0);
    const void *w_ih = constant_of(of_w_ih, 4 * H * c.I, scale), *w_hh = constant(4 * H * P, scale),
               *b_ih = constant(4 * H, scale), *b_hh = constant(4 * H, scale);
    const void* w_hr = c.projected ? constant(P * H, scale) : nullptr;
    const void *h_0 = constant(c.B * P, 1), *c_0 = constant(c.B * H, 1),
               *grad_h_n = constant(c.B * P, 1), *grad_c_n = constant(c.B * H, 1);
    void* y = outcome.buffers[output].at(d * P);
    forward[d] = {seq,   x,     c.packed ? 0 : c.B * c.I,
                  c.I,   w_ih,  w_hh,
                  b_ih,  b_hh,  w_hr,
                  h_0,   c_0,   y,
                  D * P, at(0), at(1),
                  at(2), at(3)};
    void *hidden = c.projected ? at(7) : nullptr, *grad_projected = c.projected ? at(8) : nullptr;
    backward[d] = {seq,
                   grad_output.at(d * P),
                   c.packed ? 0 : c.B * D * P,
                   D * P,
                   grad_h_n,
                   grad_c_n,
                   w_hh,
                   w_hr,
                   c_0,
                   at(2),
                   at(3),
                   at(4),
                   at(5),
                   at(6),
                   hidden,
                   grad_projected};
    gradients[d] = {seq,
                    at(4),
                    x,
                    c.packed ? 0 : c.B * c.I,
                    c.I,
                    h_0,
                    y,
                    D * P,
                    w_ih,
                    hidden,
                    grad_projected,
                    x ? outcome.buffers[grad_input].at(0) : nullptr,
                    at(9),
                    at(10),
                    at(11),
                    c.projected ? at(12) : nullptr};
  }
  auto call = [&](auto workspace, auto pass, auto* args) {
    std::vector<char> space(size_t(workspace(args, c.directions, c.threads)) + 64);
    pass(
        args, c.directions, cpu::Crew{c.threads, c.patient},
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.data()) + 63) & ~uintptr_t(63)));
  };
  call(kernel.forward_workspace, kernel.forward, forward);
  if (c.forward_only) return outcome;
  call(kernel.backward_workspace, kernel.backward, backward);
  call(kernel.gradients_workspace, kernel.gradients, gradients);
  return outcome;
}

inline Outcome run(const cpu::Kernel& kernel, Dtype dtype, const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  return run_with(kernel, dtype, c, [&](Buffer& b, float scale) {
    for (int64_t k = 0; k < b.count; ++k) b.set(k, scale * normal(random));
  });
}

}  // namespace kernel_layers
