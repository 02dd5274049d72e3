// Runs the bfloat16 kernels of the emulated AMX set beside the generic set on the same random
// layers, forward, backward and gradients, and fails where they differ by more than bfloat16's
// rounding can.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

using namespace fused_lstm;

namespace fused_lstm::cpu::generic {
extern const Kernel kernels[kDtypes];
}
namespace fused_lstm::cpu::amx {
extern const Kernel kernels[kDtypes];
}

using Buffer = std::vector<uint16_t>;

static float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

struct Case {
  int64_t T, B, I, H, P;
  bool packed, projected;
  int directions, threads;
};

struct Outcome {
  std::vector<Buffer> buffers;
};

static Outcome run(const cpu::Kernel& kernel, const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  auto data = [&](int64_t count, float scale) {
    Buffer b(static_cast<size_t>(count));
    for (uint16_t& v : b) {
      const float value = scale * normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      v = uint16_t(bits >> 16);
    }
    return b;
  };
  std::vector<int64_t> sizes, offsets;
  int64_t N = 0;
  for (int64_t t = 0; t < c.T; ++t) {
    sizes.push_back(c.packed ? c.B - t * (c.B - 1) / c.T : c.B);
    offsets.push_back(N);
    N += sizes.back();
  }
  const int64_t D = c.directions, H = c.H, P = c.P;
  const float scale = 1.0f / std::sqrt(float(H));
  const Buffer input = data(N * c.I, 1), grad_output = data(N * D * P, 1);
  Outcome outcome;
  auto out = [&](int64_t count) {
    outcome.buffers.emplace_back(size_t(count), uint16_t(0));
    return outcome.buffers.size() - 1;
  };
  const size_t output = out(N * D * P), grad_input = out(N * c.I);
  std::vector<Buffer> constants;
  constants.reserve(64);
  auto constant = [&](int64_t count, float s) {
    constants.push_back(data(count, s));
    return constants.back().data();
  };
  Forward forward[2];
  Backward backward[2];
  Gradients gradients[2];
  std::vector<std::vector<size_t>> places;
  for (int64_t d = 0; d < D; ++d)
    places.push_back({out(c.B * P), out(c.B * H), out(N * 4 * H), out(N * H), out(N * 4 * H),
                      out(c.B * P), out(c.B * H), out(c.projected ? N * H : 0),
                      out(c.projected ? N * P : 0), out(4 * H * c.I), out(4 * H * P), out(4 * H),
                      out(c.projected ? P * H : 0)});
  for (int64_t d = 0; d < D; ++d) {
    auto at = [&](int i) { return outcome.buffers[places[size_t(d)][size_t(i)]].data(); };
    const Sequence seq = {c.T,
                          c.B,
                          c.I,
                          H,
                          P,
                          c.packed ? sizes.data() : nullptr,
                          c.packed ? offsets.data() : nullptr,
                          d == 1,
                          c.projected};
    const void *w_ih = constant(4 * H * c.I, scale), *w_hh = constant(4 * H * P, scale),
               *b_ih = constant(4 * H, scale), *b_hh = constant(4 * H, scale);
    const void* w_hr = c.projected ? constant(P * H, scale) : nullptr;
    const void *h_0 = constant(c.B * P, 1), *c_0 = constant(c.B * H, 1),
               *grad_h_n = constant(c.B * P, 1), *grad_c_n = constant(c.B * H, 1);
    uint16_t* y = outcome.buffers[output].data() + d * P;
    forward[d] = {seq,   input.data(), c.packed ? 0 : c.B * c.I,
                  c.I,   w_ih,         w_hh,
                  b_ih,  b_hh,         w_hr,
                  h_0,   c_0,          y,
                  D * P, at(0),        at(1),
                  at(2), at(3)};
    void *hidden = c.projected ? at(7) : nullptr, *grad_projected = c.projected ? at(8) : nullptr;
    backward[d] = {seq,
                   grad_output.data() + d * P,
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
                    input.data(),
                    c.packed ? 0 : c.B * c.I,
                    c.I,
                    h_0,
                    y,
                    D * P,
                    w_ih,
                    hidden,
                    grad_projected,
                    outcome.buffers[grad_input].data(),
                    at(9),
                    at(10),
                    at(11),
                    c.projected ? at(12) : nullptr};
  }
  auto call = [&](auto workspace, auto pass, auto* args) {
    std::vector<char> space(size_t(workspace(args, c.directions, c.threads)) + 64);
    pass(
        args, c.directions, c.threads,
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.data()) + 63) & ~uintptr_t(63)));
  };
  call(kernel.forward_workspace, kernel.forward, forward);
  call(kernel.backward_workspace, kernel.backward, backward);
  call(kernel.gradients_workspace, kernel.gradients, gradients);
  return outcome;
}

int main() {
  const Case cases[] = {
      {5, 3, 7, 17, 17, false, false, 1, 1},   {4, 33, 33, 33, 33, false, false, 2, 2},
      {9, 17, 3, 129, 129, true, false, 1, 2}, {3, 40, 64, 96, 96, false, false, 1, 2},
      {7, 19, 5, 33, 17, true, true, 2, 2},    {6, 65, 31, 160, 160, false, false, 1, 2},
  };
  int failures = 0;
  for (const Case& c : cases) {
    const unsigned seed = 20261121;
    const Outcome truth = run(cpu::generic::kernels[kBFloat16], c, seed),
                  amx = run(cpu::amx::kernels[kBFloat16], c, seed);
    float worst = 0;
    for (size_t b = 0; b < truth.buffers.size(); ++b) {
      float largest = 0, apart = 0;
      for (size_t i = 0; i < truth.buffers[b].size(); ++i) {
        const float t = widen(truth.buffers[b][i]), a = widen(amx.buffers[b][i]);
        if (!(std::fabs(a) < 1e30f)) apart = INFINITY;
        largest = std::fmax(largest, std::fabs(t));
        apart = std::fmax(apart, std::fabs(t - a));
      }
      if (largest > 0) worst = std::fmax(worst, apart / largest);
    }
    // bfloat16 has 8 bits: results a few roundings apart differ by some 2^-8 of the largest
    const bool good = worst < 0.03f;
    failures += !good;
    std::printf(
        "T %lld B %lld I %lld H %lld P %lld packed %d directions %d: differ by %.4f of the largest "
        "%s\n",
        (long long)c.T, (long long)c.B, (long long)c.I, (long long)c.H, (long long)c.P, c.packed,
        c.directions, worst, good ? "" : "TOO MUCH");
  }
  return failures;
}
