#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_lstm::cpu {

#define FUSED_LSTM_DECLARE(isa)         \
  namespace isa {                       \
  extern const Kernel kernels[kDtypes]; \
  }
#ifdef FUSED_LSTM_HAVE_GENERIC
FUSED_LSTM_DECLARE(generic)
#endif
#ifdef FUSED_LSTM_HAVE_AVX2
FUSED_LSTM_DECLARE(avx2)
#endif
#ifdef FUSED_LSTM_HAVE_AVX512
FUSED_LSTM_DECLARE(avx512)
#endif
#ifdef FUSED_LSTM_HAVE_AVX512_BF16
FUSED_LSTM_DECLARE(avx512_bf16)
#endif
#ifdef FUSED_LSTM_HAVE_AMX
FUSED_LSTM_DECLARE(amx)
#endif

namespace {

#if defined(__x86_64__)

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }();
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

// The tile registers are large, so Linux wants to be asked for them, once a process.
[[maybe_unused]] bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d & 1u << 22, tile = d & 1u << 24;
  if (!bf16 || !tile) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

bool always() { return true; }

struct Isa {
  const char* name;
  const Kernel* kernels;
  bool (*supported)();
};

const Isa kIsas[] = {
#ifdef FUSED_LSTM_HAVE_GENERIC
    {"generic", generic::kernels, always},
#endif
#ifdef FUSED_LSTM_HAVE_AVX2
    {"avx2", avx2::kernels, has_avx2},
#endif
#ifdef FUSED_LSTM_HAVE_AVX512
    {"avx512", avx512::kernels, has_avx512},
#endif
#ifdef FUSED_LSTM_HAVE_AVX512_BF16
    {"avx512_bf16", avx512_bf16::kernels, has_avx512_bf16},
#endif
#ifdef FUSED_LSTM_HAVE_AMX
    {"amx", amx::kernels, has_amx},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

// A name in FUSED_LSTM_CPU that this machine cannot serve is ignored here: importing fused_lstm has
// refused it.
int automatic() {
  const char* wanted = std::getenv("FUSED_LSTM_CPU");
  int best = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_supported(i)) continue;
    if (wanted && std::strcmp(wanted, kIsas[i].name) == 0) return i;
    best = i;
  }
  return best;
}

std::atomic<int> forced{-1};

// Each set's kernels, with those of the set before for what it leaves out.
struct Completed {
  Kernel kernels[kIsaCount][kDtypes];

  Completed() {
    for (int isa = 0; isa < kIsaCount; ++isa)
      for (int dtype = 0; dtype < kDtypes; ++dtype) {
        const Kernel& own = kIsas[isa].kernels[dtype];
        const Kernel& before = isa > 0 ? kernels[isa - 1][dtype] : own;
        Kernel& kernel = kernels[isa][dtype] = own.forward ? own : before;
        for (int width = 0; width < kStreamWidths; ++width)
          kernel.stream[width] = (own.stream[width].run ? own : before).stream[width];
      }
  }
};

}  // namespace

int isa_count() { return kIsaCount; }

const char* isa_name(int index) { return kIsas[index].name; }

bool isa_supported(int index) {
  struct Supported {
    bool of[kIsaCount];
    Supported() {
      for (int i = 0; i < kIsaCount; ++i) of[i] = kIsas[i].supported();
    }
  };
  static const Supported supported;
  return supported.of[index];
}

int isa_active() {
  static const int choice = automatic();
  const int index = forced.load(std::memory_order_relaxed);
  return index >= 0 ? index : choice;
}

bool isa_force(int index) {
  if (index >= 0 && !isa_supported(index)) return false;
  forced.store(index, std::memory_order_relaxed);
  return true;
}

const Kernel& active_kernel(Dtype dtype) {
  static const Completed completed;
  return completed.kernels[isa_active()][dtype];
}

}  // namespace fused_lstm::cpu
