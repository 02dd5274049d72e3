// Streams without Python and torch, for a sanitizer to watch and for machines that have neither:
// each gives the bits of single steps of the forward kernel where it is to, and the same by ten
// threads that have a fork each, by several threads that share its steps, and by many steps in one
// call. Ids that are drawn do not depend on threads either.
#include <cinttypes>
#include <thread>

#include "../../csrc/cpu/sampler.h"
#include "../../csrc/cpu/threads.h"
#include "layer.h"

using namespace fused_lstm;
using cpu::Stream, cpu::StreamShape, cpu::StreamWeights, cpu::StreamWidth;
using kernel_layers::Buffer;

constexpr int64_t kSteps = 6;

struct Layers {
  StreamShape shape;
  Dtype dtype, kept;  // of the stream, and what its weights come in
  std::vector<Buffer> buffers;
  Buffer input;

  Layers(const StreamShape& shape, Dtype dtype, Dtype kept)
      : shape(shape), dtype(dtype), kept(kept), input(dtype, kSteps * shape.B * shape.I) {
    std::mt19937 random(20261127);
    std::normal_distribution<float> normal;
    const auto fill = [&](Buffer& b, float scale) {
      for (int64_t k = 0; k < b.count; ++k) b.set(k, scale * normal(random));
    };
    const float scale = 1.0f / std::sqrt(float(shape.H));
    for (int64_t l = 0; l < shape.L; ++l) {
      const int64_t I = l ? shape.P : shape.I;
      for (int64_t count : {4 * shape.H * I, 4 * shape.H * shape.P})
        buffers.emplace_back(kept, count);
      for (int bias = 0; bias < 2; ++bias) buffers.emplace_back(dtype, 4 * shape.H);
      buffers.emplace_back(kept, shape.projected ? shape.P * shape.H : 0);
    }
    for (Buffer& b : buffers) fill(b, scale);
    fill(input, 1);
  }

  std::vector<StreamWeights> weights() const {
    std::vector<StreamWeights> found;
    for (size_t l = 0; l < size_t(shape.L); ++l) {
      const Buffer* b = &buffers[5 * l];
      found.push_back({b[0].at(0), b[1].at(0), b[2].at(0), b[3].at(0), b[4].at(0)});
    }
    return found;
  }
};

// `steps` steps a call.
static Buffer outputs(Stream& stream, const Layers& layers, int64_t steps, int threads) {
  const StreamShape& s = layers.shape;
  Buffer output(layers.dtype, kSteps * s.B * s.P);
  for (int64_t t = 0; t < kSteps; t += steps)
    stream.run(steps, {const_cast<char*>(layers.input.at(t * s.B * s.I)), s.B * s.I, s.I},
               {output.at(t * s.B * s.P), s.B * s.P, s.P}, threads);
  return output;
}

// By the forward kernel, a layer and a step at a time.
static Buffer step_by_step(const Layers& layers) {
  const StreamShape& s = layers.shape;
  const cpu::Kernel& kernel = cpu::active_kernel(layers.dtype);
  Buffer output(layers.dtype, kSteps * s.B * s.P), above(layers.dtype, s.B * s.P);
  std::vector<Buffer> h, c;
  for (int64_t l = 0; l < s.L; ++l) {
    h.emplace_back(layers.dtype, s.B * s.P);
    c.emplace_back(layers.dtype, s.B * s.H);
  }
  for (int64_t t = 0; t < kSteps; ++t)
    for (int64_t l = 0; l < s.L; ++l) {
      const StreamWeights w = layers.weights()[size_t(l)];
      const int64_t I = l ? s.P : s.I;
      Buffer& from = h[size_t(l)];
      Buffer& cells = c[size_t(l)];
      const void* x = l ? h[size_t(l) - 1].at(0) : layers.input.at(t * s.B * s.I);
      Forward a{};
      a.seq = {1, s.B, I, s.H, s.P, nullptr, nullptr, false, s.projected};
      a.input = x;
      a.input_stride_t = s.B * I;
      a.input_stride_b = I;
      a.weight_ih = w.ih;
      a.weight_hh = w.hh;
      a.bias_ih = w.bias_ih;
      a.bias_hh = w.bias_hh;
      a.weight_hr = w.hr;
      a.h_0 = from.at(0);
      a.c_0 = cells.at(0);
      a.output = output.at(t * s.B * s.P);
      a.output_stride = s.P;
      a.h_n = from.at(0);
      a.c_n = cells.at(0);
      kernel.forward(&a, 1, cpu::Crew{1}, cpu::workspace(kernel.forward_workspace(&a, 1, 1)));
    }
  return output;
}

// Ids drawn one after the other, by so many threads, with an embedding or a table.
static std::vector<int64_t> drawn(const Layers& layers, StreamWidth width, int threads,
                                  bool tabled) {
  constexpr int64_t kVocabulary = 37, kLength = 9;
  StreamShape s = layers.shape;
  const Layers heads({1, 1, s.P, kVocabulary, kVocabulary, false}, layers.dtype, layers.kept);
  const Layers rows({1, 1, s.I, kVocabulary, kVocabulary, false}, layers.dtype, layers.dtype);
  const auto &head = heads.buffers[0], &bias = heads.buffers[2];  // at least so many numbers
  std::vector<StreamWeights> weights = layers.weights();
  cpu::StreamTextWeights text{head.at(0), bias.at(0), nullptr, rows.buffers[0].at(0)};
  Buffer table(layers.dtype == kFloat64 ? kFloat64 : kFloat32, kVocabulary * 4 * s.H);
  for (int64_t k = 0; k < table.count; ++k) table.set(k, float(k % 7) / 7);
  if (tabled) {
    s.I = 0;
    weights[0].ih = weights[0].bias_ih = weights[0].bias_hh = nullptr;
    text.table = table.at(0);
    text.embedding = nullptr;
  }
  cpu::Sampler sampler(layers.dtype, width, s, weights, kVocabulary, text);
  std::vector<int64_t> ids(size_t((1 + kLength) * s.B));
  std::mt19937_64 random(20261127);
  const auto uniform = [&](double* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = double(random() >> 11) * 0x1p-53;
  };
  const int64_t steps = sampler.draw(ids.data(), 1, kLength, {1.0, 20, 0.9}, {3}, uniform, threads);
  ids.push_back(steps);
  return ids;
}

static bool same(const Buffer& a, const Buffer& b) {
  return std::memcmp(a.at(0), b.at(0), size_t(a.count) * kernel_layers::element_bytes(a.dtype)) ==
         0;
}

static int check(const StreamShape& shape, Dtype dtype, StreamWidth width) {
  const Dtype kept = width == cpu::kInt8Weights       ? kFloat32
                     : width == cpu::kBFloat16Weights ? kBFloat16
                                                      : dtype;
  const Layers layers(shape, dtype, kept);
  const Stream made(dtype, width, shape, layers.weights());
  Stream alone(made);
  const Buffer expected = outputs(alone, layers, 1, 1);
  int failures = 0;
  const auto expect = [&](bool good, const char* what) {
    if (good) return;
    ++failures;
    std::printf("dtype %d width %d L %" PRId64 " B %" PRId64 " H %" PRId64 ": %s\n", dtype, width,
                shape.L, shape.B, shape.H, what);
  };
  for (int64_t i = 0; i < expected.count; ++i)
    expect(std::isfinite(expected.get(i)), "a result is not finite");
  if (width == cpu::kOwnWidth && kernel_layers::element_bytes(dtype) > 2)
    expect(same(step_by_step(layers), expected), "other bits than the forward kernel");
  Stream chunk(made), shared(made);
  expect(same(outputs(chunk, layers, kSteps, 1), expected), "other bits in one call");
  expect(same(outputs(shared, layers, 2, 3), expected), "other bits by several threads");
  for (bool tabled : {false, true})
    expect(drawn(layers, width, 1, tabled) == drawn(layers, width, 3, tabled),
           "other ids by several threads");
  std::vector<std::unique_ptr<Stream>> forks;
  std::vector<std::thread> threads;
  bool good[10] = {};
  for (int i = 0; i < 10; ++i) forks.push_back(std::make_unique<Stream>(made));
  for (size_t i = 0; i < 10; ++i)
    threads.emplace_back([&, i] { good[i] = same(outputs(*forks[i], layers, 3, 1), expected); });
  for (std::thread& thread : threads) thread.join();
  for (bool one : good) expect(one, "other bits in a thread of ten");
  return failures;
}

int main() {
  cpu::any_pace = true;  // small calls are to take several threads
  const StreamShape shapes[] = {{1, 1, 1, 1, 1, false},       {2, 1, 17, 33, 33, false},
                                {1, 3, 129, 17, 17, false},   {2, 9, 5, 65, 33, true},
                                {1, 33, 31, 129, 129, false}, {2, 1, 31, 320, 320, false}};
  int failures = 0, runs = 0;
  for (const StreamShape& shape : shapes)
    for (int dtype = 0; dtype < kDtypes; ++dtype)
      for (int width = 0; width < cpu::kStreamWidths; ++width) {
        if (!cpu::active_kernel(Dtype(dtype)).stream[width].run) continue;
        failures += check(shape, Dtype(dtype), StreamWidth(width));
        ++runs;
      }
  std::printf("%d streams, %d failures\n", runs, failures);
  return failures != 0;
}
