// Two made-up instruction sets, of which the second adds bfloat16's passes and streams with weights
// of 8 bits: prints which set's entry points serve each dtype with the second one in use.
#include <cstdio>

#include "../../csrc/cpu/dispatch.h"

namespace fused_lstm::cpu {

template <int set>
Waits run(const Forward*, int, Crew, void*) {
  return Waits(set);
}
template <int set>
Waits run_stream(const StreamCall*, int, Crew, void*) {
  return Waits(set);
}

template <int set>
constexpr Kernel kernel(bool passes, bool bytes) {
  Kernel kernel{};
  if (passes) kernel.forward = run<set>;
  if (passes) kernel.stream[kOwnWidth].run = run_stream<set>;
  if (bytes) kernel.stream[kInt8Weights].run = run_stream<set>;
  return kernel;
}

namespace generic {
extern const Kernel kernels[kDtypes];
const Kernel kernels[kDtypes] = {kernel<0>(true, true), kernel<0>(true, false),
                                 kernel<0>(true, true), kernel<0>(true, true)};
}  // namespace generic
namespace avx2 {
extern const Kernel kernels[kDtypes];
const Kernel kernels[kDtypes] = {kernel<1>(false, true), kernel<1>(false, false),
                                 kernel<1>(true, true), kernel<1>(false, true)};
}  // namespace avx2

}  // namespace fused_lstm::cpu

int main() {
  using namespace fused_lstm;
  using namespace fused_lstm::cpu;
  if (!isa_force(1)) return std::puts("this processor has no AVX2"), 0;
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    const Kernel& kernel = active_kernel(Dtype(dtype));
    std::printf("%d:", kernel.forward(nullptr, 1, {1}, nullptr));
    for (const StreamKernel& stream : kernel.stream)
      std::printf(" %d", stream.run ? stream.run(nullptr, 1, {1}, nullptr) : -1);
    std::puts("");
  }
}
