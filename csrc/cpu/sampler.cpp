#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fused_lstm::cpu {
namespace {

size_t element_bytes(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace

int64_t choose(const double* scores, int64_t count, const Choice& choice, double u,
               ChoiceScratch& scratch) {
  double check = 0;
  for (int64_t id = 0; id < count; ++id) check += scores[id] * 0;
  if (!(check == 0)) return -1;
  const int64_t first = std::max_element(scores, scores + count) - scores;
  if (choice.temperature == 0) return first;
  int64_t among = std::min(choice.top_k, count);
  const bool sorted = among < count || choice.top_p <= 1;
  std::vector<int64_t>& order = scratch.order;
  if (sorted) {
    order.resize(size_t(count));
    std::iota(order.begin(), order.end(), int64_t(0));
    std::partial_sort(order.begin(), order.begin() + among, order.end(), [&](int64_t a, int64_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
  }
  const auto id = [&](int64_t at) { return sorted ? order[size_t(at)] : at; };
  // Up to and with each. Subtracting the largest first keeps any temperature from overflowing.
  std::vector<double>& sums = scratch.sums;
  sums.resize(size_t(among));
  double sum = 0;
  for (int64_t at = 0; at < among; ++at)
    sums[size_t(at)] = sum += std::exp((scores[id(at)] - scores[first]) / choice.temperature);
  if (choice.top_p <= 1)  // those before which there is less; the first always
    sums.resize(size_t(std::lower_bound(sums.begin(), sums.end() - 1, choice.top_p * sum) -
                       sums.begin() + 1));
  const auto found = std::upper_bound(sums.begin(), sums.end(), u * sums.back());
  if (found != sums.end()) return id(found - sums.begin());
  // u is so near 1 that rounding leaves nothing beyond it: the last of those with a width.
  return id(std::lower_bound(sums.begin(), sums.end(), sums.back()) - sums.begin());
}

// What a call to draw() has for each step.
struct Sampler::Drawing {
  Sampler& sampler;
  const Choice& choice;
  const std::vector<int64_t>& stop;
  const Uniform& uniform;
  std::vector<double> u;
  ChoiceScratch scratch;
  int64_t steps = 0;  // drawn
  bool finite = true;
};

Sampler::Sampler(Dtype dtype, StreamWidth width, const StreamShape& shape,
                 const std::vector<StreamWeights>& layers, int64_t vocabulary,
                 const StreamTextWeights& weights)
    : Stream(dtype, width, shape, layers),
      text_{vocabulary, weights.table != nullptr, nullptr, nullptr, 0, draw_step, nullptr},
      kept_([&] {
        call_.text = &text_;
        return kernel_.text_bytes(call_);
      }()),
      stopped_(size_t(shape.B)),
      h_stopped_(size_t(shape.L * shape.B * shape.P) * element_bytes(dtype)),
      c_stopped_(size_t(shape.L * shape.B * shape.H) * element_bytes(dtype)) {
  text_.kept = kept_.data();
  kernel_.pack_text(call_, weights);
  products_ += shape.B * vocabulary * shape.P;
}

bool Sampler::draw_step(void* context, int64_t t, const double* scores) {
  Drawing& now = *static_cast<Drawing*>(context);
  Sampler& own = now.sampler;
  const int64_t B = own.call_.shape.B, vocabulary = own.text_.vocabulary;
  int64_t* const ids = own.text_.ids + (t + 1) * B;
  if (now.choice.temperature > 0) now.uniform(now.u.data(), B);
  bool any = false;
  for (int64_t b = 0; b < B; ++b) {
    if (own.stopped_[size_t(b)]) {
      ids[b] = 0;  // whatever: nobody sees what comes of it
      continue;
    }
    ids[b] = choose(scores + b * vocabulary, vocabulary, now.choice, now.u[size_t(b)], now.scratch);
    now.finite &= ids[b] >= 0;
    if (std::find(now.stop.begin(), now.stop.end(), ids[b]) != now.stop.end()) {
      own.stopped_[size_t(b)] = 1;
      StreamCall after = own.call_;
      after.current += t + 1;
      own.kernel_.read(after, b, b + 1, own.h_stopped_.data(), own.c_stopped_.data());
    } else {
      any = true;
    }
  }
  ++now.steps;
  return any && now.finite;
}

int64_t Sampler::draw(int64_t* ids, int64_t given, int64_t length, const Choice& choice,
                      const std::vector<int64_t>& stop, const Uniform& uniform, int threads) {
  const InUse guard(in_use_);
  const int64_t B = call_.shape.B;
  if (std::all_of(stopped_.begin(), stopped_.end(), [](char s) { return s; })) return 0;
  Drawing drawing{*this, choice, stop, uniform, std::vector<double>(size_t(B)), {}};
  const std::vector<char> before = stopped_;
  text_.ids = ids;
  text_.given = length > 0 ? given : given + 1;  // beyond the last step: no scores
  text_.context = &drawing;
  StreamCall call = call_;
  call.T = given - 1 + length;
  run_call(call, threads);
  call_.current = (call_.current + given - 1 + drawing.steps) % 2;
  if (!drawing.finite) throw std::runtime_error("the scores aren't finite: the model has diverged");
  // What was drawn in the place of a row that has stopped.
  std::vector<char> is_over = before;
  for (int64_t t = given; t < given + drawing.steps; ++t)
    for (int64_t b = 0; b < B; ++b) {
      int64_t& id = ids[t * B + b];
      if (is_over[size_t(b)])
        id = -1;
      else if (stopped_[size_t(b)] && std::find(stop.begin(), stop.end(), id) != stop.end())
        is_over[size_t(b)] = 1;
    }
  return drawing.steps;
}

void Sampler::write(const void* h, const void* c) {
  Stream::write(h, c);
  std::fill(stopped_.begin(), stopped_.end(), char(0));
}

void Sampler::read(void* h, void* c) const {
  Stream::read(h, c);
  const StreamShape& s = call_.shape;
  const size_t bytes = element_bytes(dtype_), h_row = size_t(s.P) * bytes,
               c_row = size_t(s.H) * bytes;
  for (size_t row = 0; row < size_t(s.L * s.B); ++row)
    if (stopped_[row % size_t(s.B)]) {
      std::memcpy(static_cast<char*>(h) + row * h_row, h_stopped_.data() + row * h_row, h_row);
      std::memcpy(static_cast<char*>(c) + row * c_row, c_stopped_.data() + row * c_row, c_row);
    }
}

}  // namespace fused_lstm::cpu
