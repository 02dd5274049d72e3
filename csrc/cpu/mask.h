// A dropout mask: 1 / keep or 0 in each place, independently.
//
// Philox4x32 with 7 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): a
// block of 64 elements takes what comes of eight counters, 16 bits an element, so that the mask
// depends on the seed and the place only, on no number of threads and no instruction set. torch's
// bernoulli_ draws one element after the other.
#pragma once

#include "dispatch.h"
#include "vec.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

struct Philox {
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));  // 32 bits used of each lane
  using Words = VecOf<float>::ubits;
  static constexpr int kCounters = kVectorBytes / 8, kRounds = 7;

  Wide word[4];

  // The lower halves' products.
  FUSED_LSTM_INLINE Wide times(Wide a, uint32_t b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
  }

  // Of the counters first, first + 1, ...
  Philox(uint64_t seed, uint64_t first) {
    Wide counter;
    for (int lane = 0; lane < kCounters; ++lane) counter[lane] = first + uint64_t(lane);
    word[0] = counter;
    word[1] = counter >> 32;
    word[2] = word[3] = Wide{};
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; ++round) {
      const Wide a = times(word[0], 0xD2511F53u), b = times(word[2], 0xCD9E8D57u);
      word[0] = b >> 32 ^ word[1] ^ uint64_t(key[0]);
      word[2] = a >> 32 ^ word[3] ^ uint64_t(key[1]);
      word[1] = b;
      word[3] = a;
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
  }

  // Words 0 and 1, or 2 and 3, of one counter after the other.
  FUSED_LSTM_INLINE Words pairs(const Wide* of) {
    const Wide both = (of[0] & 0xFFFFFFFFu) | of[1] << 32;
    return (Words)both;
  }
};

// Elements [begin, begin + count) of a mask.
template <class T>
static void fill_mask(void* mask, int64_t begin, int64_t count, double keep, uint64_t seed) {
  using Words = Philox::Words;
  using Signed = VecOf<float>::bits;
  constexpr int lanes = kLanes<float>, kHalf = 16;  // of 16 elements: the upper or lower 16 bits
  const int32_t below = int32_t(keep * 65536 + 0.5);
  const Vec<float> kept = splat(float(1 / keep));
  T* to = static_cast<T*>(mask) + begin;
  for (int64_t at = 0; at < count; at += kMaskBlock, to += kMaskBlock) {
    float block[kMaskBlock];
    for (int n = 0; n < 8; n += Philox::kCounters) {
      const Philox philox(seed, uint64_t((begin + at) / 8 + n));
      for (int pair = 0; pair < 2; ++pair) {
        const Words words = Philox::pairs(philox.word + 2 * pair);
        float* const place = block + 2 * kHalf * pair + 2 * n;
        const auto put = [&](float* p, Words bits) {
          const Signed chosen = (Signed)bits < below;
          store(p, (Vec<float>)(chosen & load_raw<Signed>(&kept)));
        };
        put(place, words & 0xFFFFu);
        put(place + kHalf, words >> 16);
      }
    }
    const int64_t left = count - at;
    if constexpr (sizeof(T) == 8) {
      for (int64_t i = 0; i < kMaskBlock && i < left; ++i) to[i] = block[i] > 0 ? 1 / keep : 0;
    } else {
      for (int i = 0; i < kMaskBlock && i < left; i += lanes)
        store_lanes<false>(to + i, load(block + i), lanes_at<float>(i, left));
    }
  }
}

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
