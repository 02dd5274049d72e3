// Runs stacks of layers at once (wavefront.h), in every dtype, by two and three threads and by two
// of which one goes on alone, for a sanitizer to watch; fails where a result isn't what one layer
// after the other gives on one thread.
#include "layer.h"

using namespace fused_lstm;
using kernel_layers::Buffer;

namespace fused_lstm::cpu::FUSED_LSTM_ISA {
extern const Kernel kernels[kDtypes];
}

namespace {

struct Stack {
  int layers;
  int64_t T, B, I, H, P;
  bool packed;
};

// Operands of each layer, each a block of the heap of its own, and what they come to.
struct Operands {
  std::vector<int64_t> sizes, offsets;
  std::vector<Buffer> buffers;
  std::vector<Forward> layers;

  Operands(Dtype dtype, const Stack& s) {
    std::mt19937 random(20261127);
    std::normal_distribution<float> normal;
    int64_t N = 0;
    for (int64_t t = 0; t < s.T; ++t) {
      offsets.push_back(N);
      sizes.push_back(s.packed ? s.B - t * (s.B - 1) / s.T : s.B);
      N += sizes.back();
    }
    buffers.reserve(size_t(12 * s.layers + 1));
    const auto data = [&](int64_t count, float scale) {
      buffers.emplace_back(dtype, count);
      for (int64_t i = 0; i < count; ++i) buffers.back().set(i, scale * normal(random));
      return static_cast<void*>(buffers.back().at(0));
    };
    const float scale = 1.0f / std::sqrt(float(s.H));
    void* input = data(N * s.I, 1);
    for (int l = 0; l < s.layers; ++l) {
      Forward a = {};
      const int64_t I = l == 0 ? s.I : s.P;
      a.seq = {s.T, s.B, I, s.H, s.P, nullptr, nullptr, false, s.P != s.H};
      if (s.packed) {
        a.seq.batch_sizes = sizes.data();
        a.seq.offsets = offsets.data();
      }
      a.input = input;
      a.input_stride_t = s.B * I;
      a.input_stride_b = I;
      a.weight_ih = data(4 * s.H * I, scale);
      a.weight_hh = data(4 * s.H * s.P, scale);
      a.bias_ih = data(4 * s.H, scale);
      a.bias_hh = data(4 * s.H, scale);
      if (s.P != s.H) a.weight_hr = data(s.P * s.H, scale);
      a.h_0 = data(s.B * s.P, 1);
      a.c_0 = data(s.B * s.H, 1);
      input = a.output = data(N * s.P, 0);
      a.output_stride = s.P;
      a.h_n = data(s.B * s.P, 0);
      a.c_n = data(s.B * s.H, 0);
      layers.push_back(a);
    }
  }

  template <class Workspace, class Pass>
  void run(Workspace workspace, Pass pass, const Forward* args, int count, cpu::Crew crew) {
    std::vector<char> space(size_t(workspace(args, count, crew.threads)) + 64);
    const auto aligned = (reinterpret_cast<uintptr_t>(space.data()) + 63) & ~uintptr_t(63);
    pass(args, count, crew, reinterpret_cast<void*>(aligned));
  }
};

bool same(const Operands& a, const Operands& b, Dtype dtype) {
  for (size_t i = 0; i < a.buffers.size(); ++i)
    if (std::memcmp(a.buffers[i].at(0), b.buffers[i].at(0),
                    size_t(a.buffers[i].count) * kernel_layers::element_bytes(dtype)))
      return false;
  return true;
}

}  // namespace

int main() {
  const Stack stacks[] = {
      {2, 129, 1, 5, 33, 33, false},
      {3, 65, 3, 17, 65, 65, true},
      {8, 33, 5, 33, 17, 17, false},
      {2, 67, 4, 9, 33, 17, false},
  };
  int failures = 0, runs = 0;
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    const cpu::Kernel& kernel = cpu::FUSED_LSTM_ISA::kernels[dtype];
    for (const Stack& s : stacks) {
      Operands alone(Dtype(dtype), s);
      for (const Forward& layer : alone.layers)
        alone.run(kernel.forward_workspace, kernel.forward, &layer, 1, {1, true});
      const cpu::Crew crews[] = {{2, true}, {3, true}, {2, false}};
      for (const cpu::Crew& crew : crews) {
        Operands at_once(Dtype(dtype), s);
        at_once.run(kernel.wavefront_workspace, kernel.wavefront, at_once.layers.data(), s.layers,
                    crew);
        ++runs;
        if (same(alone, at_once, Dtype(dtype))) continue;
        ++failures;
        std::printf("dtype %d, %d layers of %lld, %d threads: other bits\n", dtype, s.layers,
                    (long long)s.H, crew.threads);
      }
    }
  }
  std::printf("%d stacks, %d failures\n", runs, failures);
  return failures != 0;
}
