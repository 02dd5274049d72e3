#include "stream.h"

#include <cstring>
#include <stdexcept>

#include "threads.h"

namespace fused_lstm::cpu {
namespace {

const StreamKernel& kernel_of(Dtype dtype, StreamWidth width) {
  const StreamKernel& kernel = active_kernel(dtype).stream[width];
  if (!kernel.run)
    throw std::invalid_argument("weights of this width are for streams in float32" +
                                std::string(width == kInt8Weights ? ", bfloat16 and float16" : ""));
  return kernel;
}

int64_t products(const StreamShape& s) {
  return s.gate_products() + (s.projected ? s.B * s.L * s.H * s.P : 0);
}

}  // namespace

Stream::InUse::InUse(std::atomic<bool>& flag) : flag_(flag) {
  if (flag.exchange(true, std::memory_order_acquire))
    throw std::runtime_error(
        "this stream is in use by another thread: give each one its own, fork()");
}

Stream::Stream(Dtype dtype, StreamWidth width, const StreamShape& shape,
               const std::vector<StreamWeights>& layers)
    : dtype_(dtype),
      kernel_(kernel_of(dtype, width)),
      call_{shape, nullptr, nullptr, 0, 0, nullptr, 0, 0, nullptr, 0, 0, nullptr},
      state_(kernel_.state_bytes(call_)),
      products_(products(shape)) {
  call_.state = state_.data();
  pack(layers);
  std::memset(state_.data(), 0, size_t(state_.bytes()));
}

Stream::Stream(const Stream& other)
    : dtype_(other.dtype_),
      kernel_(other.kernel_),
      call_(other.call_),
      weights_(other.weights_),
      state_(other.state_.bytes()),
      products_(other.products_) {
  const InUse guard(other.in_use_);
  call_.state = state_.data();
  std::memcpy(state_.data(), other.state_.data(), size_t(state_.bytes()));
}

// Into new memory: forks go on with the old.
void Stream::pack(const std::vector<StreamWeights>& layers) {
  const InUse guard(in_use_);
  StreamCall call = call_;
  const auto memory = std::make_shared<const Memory>(kernel_.weight_bytes(call));
  call.weights = memory->data();
  for (size_t l = 0; l < layers.size(); ++l) kernel_.pack(call, int64_t(l), layers[l]);
  weights_ = memory;
  call_.weights = memory->data();
}

void Stream::run(int64_t T, const Rows& x, const Rows& y, int threads) {
  const InUse guard(in_use_);
  StreamCall call = call_;
  call.T = T;
  call.x = x.data;
  call.x_stride_t = x.stride_t;
  call.x_stride_b = x.stride_b;
  call.y = y.data;
  call.y_stride_t = y.stride_t;
  call.y_stride_b = y.stride_b;
  run_call(call, threads);
  call_.current = (call_.current + T) % 2;
}

void Stream::run_call(const StreamCall& call, int threads) const {
  if (threads > 1) {
    Threads(call.T * products_, threads).run(kernel_.workspace, kernel_.run, &call, 1);
  } else {
    kernel_.run(&call, 1, Crew{1}, workspace(kernel_.workspace(&call, 1, 1)));
  }
}

void Stream::reset() {
  const InUse guard(in_use_);
  kernel_.write(call_, 0, call_.shape.B, nullptr, nullptr);
}

void Stream::reset(const std::vector<int64_t>& rows) {
  const InUse guard(in_use_);
  for (const int64_t row : rows) kernel_.write(call_, row, row + 1, nullptr, nullptr);
}

void Stream::write(const void* h, const void* c) {
  const InUse guard(in_use_);
  kernel_.write(call_, 0, call_.shape.B, h, c);
}

void Stream::read(void* h, void* c) const {
  const InUse guard(in_use_);
  kernel_.read(call_, 0, call_.shape.B, h, c);
}

}  // namespace fused_lstm::cpu
