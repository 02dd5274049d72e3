// What the lanes of a warp do together, and what becomes of the words they publish.
#include "emulator.h"

namespace fused_lstm::cuda::emulation {
namespace {

void any(void* const (&arguments)[kLanesOfWarp]) {
  bool found = false;
  for (void* argument : arguments) found |= static_cast<Any*>(argument)->value;
  for (void* argument : arguments) static_cast<Any*>(argument)->value = found;
}

void shuffle(void* const (&arguments)[kLanesOfWarp]) {
  uint32_t values[kLanesOfWarp];
  for (int lane = 0; lane < kLanesOfWarp; ++lane)
    values[lane] = static_cast<Shuffle*>(arguments[lane])->value;
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    Shuffle& own = *static_cast<Shuffle*>(arguments[lane]);
    own.value = values[(lane ^ own.mask) % kLanesOfWarp];
  }
}

float half_of(Collective what, uint32_t word, int half) {
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  return what == kMmaBf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// Products are exact, their sum is cut off to float: the hardware keeps few bits more.
float cut_off(double sum) {
  if (sum != sum) return bits_float(0x7fffffff);
  const float nearest = float(sum);
  const bool away = std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(sum);
  return away ? bits_float(float_bits(nearest) - 1) : nearest;
}

// d (16, 8) += a (16, K) b (K, 8). Where each lane has its elements: PTX ISA, "Matrix fragments for
// mma.m16n8k8" (.tf32, K 8) and "for mma.m16n8k16" (.bf16, .f16, K 16).
void mma(Collective what, void* const (&arguments)[kLanesOfWarp]) {
  const bool words = what == kMmaTf32;
  const int K = words ? 8 : 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    const Mma& own = *static_cast<Mma*>(arguments[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = group + r % 2 * 8;
      const uint32_t word = own.a->word[r];
      if (words) {  // the lower 13 bits play no part
        a[row][in_group + r / 2 * 4] = bits_float(word & ~0x1fffu);
      } else {
        for (int half = 0; half < 2; ++half)
          a[row][in_group * 2 + r / 2 * 8 + half] = half_of(what, word, half);
      }
    }
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = own.b[r];
      if (words) {
        b[in_group + r * 4][group] = bits_float(word & ~0x1fffu);
      } else {
        for (int half = 0; half < 2; ++half)
          b[in_group * 2 + r * 8 + half][group] = half_of(what, word, half);
      }
    }
  }
  double products[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) products[row][n] += double(a[row][k]) * double(b[k][n]);
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    float* d = static_cast<Mma*>(arguments[lane])->d;
    for (int r = 0; r < 4; ++r)
      d[r] = cut_off(d[r] + products[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
  }
}

}  // namespace

void perform(Collective what, void* const (&arguments)[kLanesOfWarp]) {
  if (what == kAny) return any(arguments);
  if (what == kShuffle) return shuffle(arguments);
  if (what != kWarpBarrier) mma(what, arguments);
}

const char* Publications::add(uint32_t* at, uint32_t word, int fibre) {
  if (word == kNotYetPublished) return "publishes a word that says \"not yet\"";
  if (*at != kNotYetPublished || !index_.emplace(at, waiting_.size()).second)
    return "publishes a word twice, or where the memory was not filled with \"not yet\"";
  waiting_.push_back({at, word, fibre});
  return nullptr;
}

void Publications::overlay(const void* at, Words& words, int fibre) const {
  if (waiting_.empty()) return;
  for (int i = 0; i < 4; ++i) {
    const auto found = index_.find(static_cast<const uint32_t*>(at) + i);
    if (found != index_.end() && waiting_[found->second].fibre == fibre)
      words.word[i] = waiting_[found->second].word;
  }
}

void Publications::arrive(size_t index) {
  const Publication arrived = waiting_[index];
  *arrived.at = arrived.word;
  index_.erase(arrived.at);
  if (index + 1 < waiting_.size()) {
    waiting_[index] = waiting_.back();
    index_[waiting_[index].at] = index;
  }
  waiting_.pop_back();
}

void Publications::clear() {
  waiting_.clear();
  index_.clear();
}

}  // namespace fused_lstm::cuda::emulation
