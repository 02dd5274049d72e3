// The CPU kernels, compiled once for each instruction set (FUSED_LSTM_ISA names it; setup.py gives
// the flags). What is computed and how it is shared out: forward.h, wavefront.h, backward.h and
// gradients.h; the product: product.h; the threads: team.h.
//
// Everything lives in a namespace of the set's name and uses no inline function of the standard
// library: the linker would merge such a function's copies and could keep the one compiled for a
// set this machine lacks.
#include "backward.h"
#include "dispatch.h"
#include "forward.h"
#include "gradients.h"
#include "mask.h"
#include "stream_pass.h"
#include "wavefront.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// The larger of what `threads` and what one thread need: see run_team's refusal.
template <class Pass, class Args>
static int64_t workspace_bytes(const Args* args, int directions, int threads) {
  int64_t most = 0;
  const int counts[] = {threads, 1};
  for (const int n : counts) {
    const int64_t bytes = Pass(args, directions, n).lay_out(nullptr);
    if (bytes > most) most = bytes;
  }
  return most;
}

// A pass, whichever it is: what runs it is compiled once, not for each (35 of AVX2's 717 KB).
struct AnyPass {
  const void* pass;
  void (*run)(const void* pass, int thread);
  Barriers barriers;
  int64_t products;
  int team;
};

// Whether n threads, or all that the team is of, have run the pass; and how they have waited.
static __attribute__((noinline)) bool run_pass(const AnyPass& any, int n, bool patient,
                                               Waits& waits) {
  Barriers barriers = any.barriers;
  const int64_t now = nanoseconds();
  barriers.clear(patient ? patience(any.products) : -1, now);
  // All n threads, though the team may be smaller: OpenMP ends and remakes threads when their
  // number changes.
  Barrier end{};
  end.released = now;
  const bool has_run =
      run_team(any.team == 1 ? 1 : n, end, [&](int thread) { any.run(any.pass, thread); });
  waits = barriers.waits();
  if (waits != kLost && end.stalled) waits = end.lost ? kLost : kStalled;
  return has_run;
}

template <class Pass, class Args>
static Waits run(const Args* args, int directions, Crew crew, void* workspace) {
  Waits waits = kShortWaits;
  for (int n = crew.threads;; n = 1) {
    Pass pass(args, directions, n);
    pass.lay_out(workspace);
    // A thread may leave a pass early, where another goes on alone.
    const auto run = [](const void* of, int thread) {
      static_cast<const Pass*>(of)->run(thread);
      Pass::Gemm::end();
    };
    const AnyPass any{&pass, run, pass.barriers, pass.group_products(), pass.team_size()};
    if (run_pass(any, n, crew.patient, waits) || n == 1) return waits;
  }
}

template <class T, class Gemm>
constexpr StreamKernel stream_kernel() {
  using Pass = StreamPass<T, Gemm>;
  using Layout = StreamLayout<T, Gemm>;
  return {[](const StreamCall& call) { return Layout(call).weight_bytes(); },
          [](const StreamCall& call) { return Layout(call).state_bytes(); },
          [](const StreamCall& call) { return Layout(call).text_bytes(); },
          [](const StreamCall& call, int64_t layer, const StreamWeights& weights) {
            Layout(call).pack(layer, weights);
          },
          [](const StreamCall& call, const StreamTextWeights& weights) {
            Layout(call).pack_text(weights);
          },
          [](const StreamCall& call, int64_t begin, int64_t end, const void* h, const void* c) {
            Layout(call).write_state({begin, end}, static_cast<const T*>(h),
                                     static_cast<const T*>(c));
          },
          [](const StreamCall& call, int64_t begin, int64_t end, void* h, void* c) {
            Layout(call).read_state({begin, end}, static_cast<T*>(h), static_cast<T*>(c));
          },
          workspace_bytes<Pass, StreamCall>,
          run<Pass, StreamCall>};
}

// How a stream keeps the weights of a compute dtype at their own width.
template <class T>
struct KeptOf {
  using type = typename ProductOf<T>::type;
};
template <>
struct KeptOf<Half> {
  using type = Product<MultiplyWidened<Half>>;
};
#if !defined(FUSED_LSTM_DOT_BF16) && !defined(FUSED_LSTM_TILE_BF16)
template <>
struct KeptOf<BFloat16> {
  using type = Product<MultiplyWidened<BFloat16>>;
};
#endif

// What is compiled for this set. Where the set before it is built too, dispatch.cpp takes from that
// one what is null here, all that this set's own instructions would change nothing of: AVX-512 BF16
// adds bfloat16's products and, with VNNI, those with weights of 8 bits; AMX adds bfloat16's. (All
// of it three times took 72 s more of a processor to compile, and 2.4 MB more of the library.)
#if defined(FUSED_LSTM_TILE_BF16) && defined(FUSED_LSTM_HAVE_AVX512_BF16)
constexpr bool kAll = false, kBytes = false;
#elif defined(FUSED_LSTM_DOT_BF16) && defined(FUSED_LSTM_HAVE_AVX512)
constexpr bool kAll = false, kBytes = true;
#else
constexpr bool kAll = true, kBytes = true;
#endif
template <class T>
constexpr bool kPasses = kAll;
template <>
constexpr bool kPasses<BFloat16> = true;

template <class T>
constexpr Kernel kernel_of() {
  Kernel kernel{};
  if constexpr (kPasses<T>)
    kernel = {workspace_bytes<ForwardPass<T>, Forward>,
              run<ForwardPass<T>, Forward>,
              WavefrontPass<T>::pays,
              workspace_bytes<WavefrontPass<T>, Forward>,
              run<WavefrontPass<T>, Forward>,
              workspace_bytes<BackwardPass<T>, Backward>,
              run<BackwardPass<T>, Backward>,
              workspace_bytes<GradientsPass<T>, Gradients>,
              run<GradientsPass<T>, Gradients>,
              {stream_kernel<T, typename KeptOf<T>::type>()},
              fill_mask<T>};
  if constexpr (kPasses<T> && sizeof(T) == 4)
    kernel.stream[kBFloat16Weights] = stream_kernel<T, Product<MultiplyWidened<BFloat16>>>();
  if constexpr (kBytes && sizeof(T) < 8)
    kernel.stream[kInt8Weights] = stream_kernel<T, ProductBytes>();
  return kernel;
}

extern const Kernel kernels[kDtypes];
const Kernel kernels[kDtypes] = {kernel_of<float>(), kernel_of<double>(), kernel_of<BFloat16>(),
                                 kernel_of<Half>()};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
