// fused_lstm._C.fill_mask: the mask of fused_lstm.Dropout.
#include <algorithm>
#include <optional>

#include "cpu/processors.h"
#include "module.h"
#include "module_tensors.h"

using namespace fused_lstm;

namespace {

// mask: dense, whatever its order of dimensions: elements are filled as they lie.
void fill_mask(py::handle object, double keep, uint64_t seed) {
  const at::Tensor& mask = tensor(object, "mask");
  const std::optional<Dtype> dtype = dtype_of(mask.scalar_type());
  if (!dtype) throw py::value_error(words("no mask is of ", name(mask.scalar_type())));
  if (!mask.is_non_overlapping_and_dense()) throw std::runtime_error("the mask must be dense");
  if (!(keep > 0 && keep <= 1)) throw py::value_error(words("keep is a probability, got ", keep));
  const cpu::Kernel& kernel = cpu::active_kernel(*dtype);
  void* const data = mask.mutable_data_ptr();
  constexpr int64_t kBlock = cpu::kMaskBlock, kLeast = 512;  // of a thread's blocks: 10 us
  const int64_t count = mask.numel(), blocks = (count + kBlock - 1) / kBlock;
  const int threads = cpu::thread_limit(at::get_num_threads(), cpu::processors());
  const int64_t share = std::max(kLeast, (blocks + threads - 1) / threads);
  const py::gil_scoped_release others_may_run;
  at::parallel_for(0, blocks, share, [&](int64_t begin, int64_t end) {
    kernel.fill_mask(data, begin * kBlock, std::min(end * kBlock, count) - begin * kBlock, keep,
                     seed);
  });
}

}  // namespace

void define_mask(py::module_& m) {
  m.def("fill_mask", &fill_mask, py::arg("mask"), py::arg("keep"), py::arg("seed"),
        "1 / keep or 0 in each element, the first with probability keep (in steps of 2^-16).\n"
        "Depends on the seed and the element's place, not on threads or the instruction set.");
}
