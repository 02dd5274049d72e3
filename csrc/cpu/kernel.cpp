// The CPU kernels, compiled once for each instruction set (FUSED_LSTM_ISA names it; setup.py gives
// the flags). What is computed and how it is shared out: forward.h, backward.h and gradients.h; the
// product: product.h; the threads: team.h.
//
// Everything lives in a namespace of the set's name and uses no inline function of the standard
// library: the linker would merge such a function's copies and could keep the one compiled for a
// set this machine lacks.
#include "backward.h"
#include "dispatch.h"
#include "forward.h"
#include "gradients.h"
#include "stream_pass.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

// The larger of what `threads` and what one thread need: see run_team's refusal.
template <class Pass, class Args>
static int64_t workspace_bytes(const Args* args, int directions, int threads) {
  const int64_t many = Pass(args, directions, threads).lay_out(nullptr);
  const int64_t one = Pass(args, directions, 1).lay_out(nullptr);
  return many > one ? many : one;
}

template <class Pass, class Args>
static Waits run(const Args* args, int directions, Crew crew, void* workspace) {
  Waits waits = kShortWaits;
  auto attempt = [&](int n) {
    Pass pass(args, directions, n);
    pass.lay_out(workspace);
    const int64_t now = nanoseconds();
    pass.barriers.clear(crew.patient ? patience(pass.group_products()) : -1, now);
    // All n threads, though the team may be smaller: OpenMP ends and remakes threads when their
    // number changes.
    const int team = pass.team_size() == 1 ? 1 : n;
    Barrier end{};
    end.released = now;
    const bool has_run = run_team(team, end, [&](int thread) { pass.run(thread); });
    waits = pass.barriers.waits();
    if (waits != kLost && end.stalled) waits = end.lost ? kLost : kStalled;
    return has_run;
  };
  if (!attempt(crew.threads)) attempt(1);
  return waits;
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

template <class T>
constexpr Kernel kernel_of() {
  StreamKernel narrower{}, bytes{};
  if constexpr (sizeof(T) == 4) narrower = stream_kernel<T, Product<MultiplyWidened<BFloat16>>>();
  if constexpr (sizeof(T) < 8) bytes = stream_kernel<T, ProductBytes>();
  return {workspace_bytes<ForwardPass<T>, Forward>,
          run<ForwardPass<T>, Forward>,
          workspace_bytes<BackwardPass<T>, Backward>,
          run<BackwardPass<T>, Backward>,
          workspace_bytes<GradientsPass<T>, Gradients>,
          run<GradientsPass<T>, Gradients>,
          {stream_kernel<T, typename KeptOf<T>::type>(), narrower, bytes}};
}

extern const Kernel kernels[kDtypes];
const Kernel kernels[kDtypes] = {kernel_of<float>(), kernel_of<double>(), kernel_of<BFloat16>(),
                                 kernel_of<Half>()};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
