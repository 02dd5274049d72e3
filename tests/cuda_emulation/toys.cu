// Small kernels that show what the emulator does: right ones, and one for each thing it must catch.
#include "cuda/launch.cuh"
#include "cuda/product.cuh"

namespace fused_lstm::cuda {
namespace {

// --- d = c + a b on one warp, in the fragments of PTX's mma --------------------------------------

struct ProductParams {
  int operands;  // 0 bf16, 1 f16, 2 tf32
  const float *a, *b, *c;
  float* d;
};

FUSED_LSTM_KERNEL(32) product_kernel(ProductParams params) {
  const int lane = thread_index(), group = lane >> 2, in_group = lane & 3;
  const int K = params.operands == 2 ? 8 : 16;
  const auto a = [&](int row, int k) { return params.a[row * K + k]; };
  const auto b = [&](int k, int n) { return params.b[k * 8 + n]; };
  const auto pair = [&](float low, float high) {
    return params.operands == 0 ? float_to_bf16(low) | uint32_t(float_to_bf16(high)) << 16
                                : float_to_f16(low) | uint32_t(float_to_f16(high)) << 16;
  };
  const int row = group, below = group + 8, column = 2 * in_group;
  float d[4] = {params.c[row * 8 + column], params.c[row * 8 + column + 1],
                params.c[below * 8 + column], params.c[below * 8 + column + 1]};
  if (params.operands == 2) {
    const Words words = {{float_bits(a(row, in_group)), float_bits(a(below, in_group)),
                          float_bits(a(row, in_group + 4)), float_bits(a(below, in_group + 4))}};
    mma_tf32(d, words, float_bits(b(in_group, group)), float_bits(b(in_group + 4, group)));
  } else {
    const Words words = {{pair(a(row, column), a(row, column + 1)),
                          pair(a(below, column), a(below, column + 1)),
                          pair(a(row, column + 8), a(row, column + 9)),
                          pair(a(below, column + 8), a(below, column + 9))}};
    const uint32_t b0 = pair(b(column, group), b(column + 1, group));
    const uint32_t b1 = pair(b(column + 8, group), b(column + 9, group));
    if (params.operands == 0)
      mma_bf16(d, words, b0, b1);
    else
      mma_f16(d, words, b0, b1);
  }
  for (int r = 0; r < 4; ++r) params.d[(r < 2 ? row : below) * 8 + column + r % 2] = d[r];
}

// --- sums over a block: (blocks, threads) -> (blocks), and the sums of pairs of lanes ------------

struct SumParams {
  const float* values;
  float *sums, *pairs;
};

FUSED_LSTM_KERNEL(256) sum_kernel(SumParams params) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), at = block_index() * thread_count() + thread;
  shared[thread] = params.values[at];
  for (int half = thread_count() / 2; half > 0; half /= 2) {
    block_barrier();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  if (thread == 0) params.sums[block_index()] = shared[0];
  params.pairs[at] = params.values[at] + shuffle_xor(params.values[at], 1);
}

// --- blocks that tell each other words: 1 + the sum of (b + 1) word b --------

struct TellParams {
  int steps;
  bool wait;
  uint32_t* words;  // (steps, blocks, 4), filled with 0xff
};

FUSED_LSTM_KERNEL(32) tell_kernel(TellParams params) {
  const int lane = thread_index();
  for (int s = 0; s < params.steps; ++s) {
    uint32_t sum = 1;
    for (int b = 0; s > 0 && b < block_count(); ++b) {
      const uint32_t* at = params.words + ((s - 1) * block_count() + b) * 4;
      Words words = load_published(at);
      while (params.wait && warp_any(words.word[lane % 4] == 0xffffffffu))
        words = load_published(at);
      sum += uint32_t(b + 1) * words.word[lane % 4];
    }
    if (lane < 4) publish(params.words + (s * block_count() + block_index()) * 4 + lane, sum);
  }
}

// --- lanes that store 4 or 16 bytes to shared memory, `stride` words apart

struct AccessParams {
  int bytes, stride;
};

FUSED_LSTM_KERNEL(32) access_kernel(AccessParams params) {
  float* const at = reinterpret_cast<float*>(shared_memory()) + thread_index() * params.stride;
  if (params.bytes == 4)
    store_element(at, 1.0f);
  else
    store_words(at, Words{});
  block_barrier();
}

// --- a wait that never ends, and one that does

FUSED_LSTM_KERNEL(32) wait_kernel(int tries) {
  Patience patience;
  for (int i = 0; i < tries; ++i) patience.lose();
}

// --- what must not happen ------------------------------------------------------------------------

enum Mistake {
  kNone,
  kLanesApart,
  kLaneGone,
  kThreadGone,
  kThreadsApart,
  kWordNeverComes,
  kBarrierNeverComes,
  kGivesUp,
  kPublishesTwice,
  kPublishesNotYet,
  kMisaligned,
  kBeyondSharedMemory,
  kWildPointer,
  kStackOverflow,
  kReadsUnwritten,
};

struct MistakeParams {
  int mistake;
  uint32_t* words;  // (8), the first 4 filled with 0xff, the others with zero
  float* found;
};

FUSED_LSTM_DEVICE int deep(volatile char* outer) {
  volatile char inner[4096];
  inner[0] = outer[0];
  return outer[0] == 77 ? 0 : deep(inner) + inner[0];
}

FUSED_LSTM_KERNEL(64) mistake_kernel(MistakeParams params) {
  const int thread = thread_index(), mistake = params.mistake;
  char* shared = shared_memory();
  if (mistake == kLanesApart) {
    if (thread % 2)
      warp_any(true);
    else
      warp_barrier();
  }
  if ((mistake == kLaneGone || mistake == kThreadGone) && thread == 7) return;
  if (mistake == kLaneGone) warp_barrier();
  if (mistake == kThreadGone) block_barrier();
  if (mistake == kThreadsApart) {
    if (thread < 32)
      block_barrier();
    else
      block_barrier();
  }
  if (mistake == kWordNeverComes) {
    const uint32_t* at = params.words + (thread == 3 ? 0 : 4);
    uint32_t word = load_published(at).word[0];
    while (warp_any(word == 0xffffffffu))
      if (word == 0xffffffffu) word = load_published(at).word[0];
  }
  if (mistake == kBarrierNeverComes) {
    if (thread < 32)
      block_barrier();
    else
      while (load_published(params.words).word[0] == 0xffffffffu) {
      }
  }
  if (mistake == kGivesUp) give_up();
  if (mistake == kPublishesTwice && thread < 2) publish(params.words, 1);
  if (mistake == kPublishesNotYet && thread == 0) publish(params.words, 0xffffffffu);
  if (mistake == kMisaligned) load_words(shared + 8);
  if (mistake == kBeyondSharedMemory) store_words(shared + 1024, Words{});
  if (mistake == kWildPointer) *params.found = 1;
  if (mistake == kStackOverflow) params.found[0] = float(deep(shared));
  if (mistake == kReadsUnwritten) params.found[0] = reinterpret_cast<float*>(shared)[thread];
}

}  // namespace

extern "C" {

const char* toy_product(int operands, const float* a, const float* b, const float* c, float* d) {
  return launch(product_kernel, Grid{1, 32, 0, false}, nullptr,
                ProductParams{operands, a, b, c, d});
}

const char* toy_sum(int blocks, int threads, const float* values, float* sums, float* pairs) {
  return launch(sum_kernel, Grid{blocks, threads, threads * 4, false}, nullptr,
                SumParams{values, sums, pairs});
}

const char* toy_tell(int blocks, int steps, bool wait, uint32_t* words) {
  fill(words, 0xff, size_t(steps) * blocks * 16, nullptr);
  return launch(tell_kernel, Grid{blocks, 32, 0, true}, nullptr, TellParams{steps, wait, words});
}

const char* toy_mistake(int mistake, uint32_t* words, float* found) {
  fill(words, 0xff, 16, nullptr);
  fill(words + 4, 0, 16, nullptr);
  return launch(mistake_kernel, Grid{1, 64, 1024, false}, nullptr,
                MistakeParams{mistake, words, found});
}

const char* toy_access(int bytes, int stride) {
  return launch(access_kernel, Grid{1, 32, 32 * 36 * 4, false}, nullptr,
                AccessParams{bytes, stride});
}

const char* toy_wait(int tries) {
  return launch(wait_kernel, Grid{1, 32, 0, false}, nullptr, tries);
}

const char* toy_grid(int blocks, int threads, int shared_bytes, bool together) {
  const auto nothing = [](int) {};
  return launch<int>(nothing, Grid{blocks, threads, shared_bytes, together}, nullptr, 0);
}

// float -> what `to` says: 0 bfloat16's bits, 1 half's, 2 tf32; 3 half's bits -> float;
// 4 exp2_approximate, 5 reciprocal_approximate.
void toy_convert(int to, int count, const float* values, float* results) {
  for (int i = 0; i < count; ++i) {
    const float v = values[i];
    results[i] = to == 0   ? bf16_to_float(float_to_bf16(v))
                 : to == 1 ? f16_to_float(float_to_f16(v))
                 : to == 2 ? round_tf32(v)
                 : to == 3 ? f16_to_float(uint16_t(v))
                 : to == 4 ? exp2_approximate(v)
                           : reciprocal_approximate(v);
  }
}

}  // extern "C"

}  // namespace fused_lstm::cuda
