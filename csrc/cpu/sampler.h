// A stream of ids: each step's are drawn from what the step before makes of them. No torch.
#pragma once

#include <functional>
#include <vector>

#include "stream.h"

namespace fused_lstm::cpu {

struct Choice {
  double temperature;  // 0: the likeliest
  int64_t top_k;       // among so many likeliest, at least 1
  double top_p;        // and of those among the fewest that together have so much; above 1: all
};

struct ChoiceScratch {
  std::vector<int64_t> order;
  std::vector<double> sums;
};

// An id drawn from softmax(scores / temperature). The ids that it is drawn among are laid out along
// [0, 1), each as wide as it is likely: in their order, or with top_p or a top_k that leaves some
// out the likeliest first, ties in their order. u says where. -1: a score isn't finite.
int64_t choose(const double* scores, int64_t count, const Choice& choice, double u,
               ChoiceScratch& scratch);

class Sampler : public Stream {
 public:
  using Uniform = std::function<void(double* to, int64_t count)>;  // in [0, 1)

  // shape.I is 0 where `weights` has a table.
  Sampler(Dtype dtype, StreamWidth width, const StreamShape& shape,
          const std::vector<StreamWeights>& layers, int64_t vocabulary,
          const StreamTextWeights& weights);

  // ids: (given + length, B), the first `given` given, at least one; the last doesn't go in. A row
  // that has drawn one of `stop` draws no more, here and in later calls: -1, and its state stays as
  // it was before that one. Returns how many steps were drawn, fewer where no row draws any more.
  // Throws std::runtime_error where a score isn't finite.
  int64_t draw(int64_t* ids, int64_t given, int64_t length, const Choice& choice,
               const std::vector<int64_t>& stop, const Uniform& uniform, int threads);

  // As Stream's; what is written draws again.
  void write(const void* h, const void* c);
  void read(void* h, void* c) const;

  int64_t vocabulary() const { return text_.vocabulary; }
  int64_t text_bytes() const { return kept_.bytes(); }

 private:
  struct Drawing;
  static bool draw_step(void* context, int64_t t, const double* scores);

  StreamText text_;
  Memory kept_;
  std::vector<char> stopped_;                // (B)
  std::vector<char> h_stopped_, c_stopped_;  // (L, B, ...) of the compute dtype, of rows that have
};

}  // namespace fused_lstm::cpu
