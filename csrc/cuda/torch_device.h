// What of torch differs between a GPU and its emulation: the device, its stream, and the product of
// one step. The emulation's tensors are the CPU's.
#pragma once

#include "../operators.h"
#include "launch.h"

#if !defined(FUSED_LSTM_EMULATION)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
// cuBLAS's headers don't come with every toolkit, nor does torch's header do without the others.
#if __has_include(<cublas_v2.h>) && __has_include(<cusparse.h>) && __has_include(<cusolverDn.h>)
#include <ATen/cuda/CUDAContextLight.h>
#define FUSED_LSTM_CUBLAS
#endif
#endif

#ifndef FUSED_LSTM_CUBLAS
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#endif

namespace fused_lstm::cuda {

// Makes the tensor's device the current one; `stream` is its current stream.
class CurrentDevice {
#ifdef FUSED_LSTM_EMULATION
 public:
  explicit CurrentDevice(const at::Tensor&) {}
  const Stream stream = nullptr;
#else
  const c10::cuda::CUDAGuard guard_;

 public:
  explicit CurrentDevice(const at::Tensor& t)
      : guard_(t.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
  const Stream stream;
#endif
};

// Raises RuntimeError where a kernel could not be enqueued.
inline void check(const char* error) {
  TORCH_CHECK(error == nullptr, "fused_lstm: the GPU refused a kernel: ", error);
}

// The product of one step, which is so small that the way to it counts: to cuBLAS directly, some
// microseconds less than by the dispatcher. Takes cuBLAS as torch has set it up (its stream,
// workspace and flags), so between construction and last use no other product may be enqueued.
class StepProduct {
 public:
  enum Weight { kTransposed, kPlain };

#ifdef FUSED_LSTM_CUBLAS
  explicit StepProduct(const LayerCall& call)
      : dtype_(call.dtype), handle_(at::cuda::getCurrentCUDABlasHandle()) {}

  // out (rows, n) = a (rows, k) w, plus what `out` holds if `add`; w is (k, n), or the transpose
  // of (n, k). All dense.
  void operator()(int64_t rows, const void* a, const at::Tensor& w, Weight kind, bool add,
                  void* out) const {
    // cuBLAS's matrices are column-major: out^T (n, rows) = w^T a^T
    const auto op = kind == kTransposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const int m = int(rows), n = int(w.size(kind == kTransposed ? 0 : 1)),
              k = int(w.size(kind == kTransposed ? 1 : 0)), w_stride = int(w.size(1));
    const float one = 1, beta = add ? 1 : 0;
    const double wide_one = 1, wide_beta = beta;
    cublasStatus_t status;
    if (dtype_ == kFloat32) {
      status =
          cublasSgemm(handle_, op, CUBLAS_OP_N, n, m, k, &one, w.const_data_ptr<float>(), w_stride,
                      static_cast<const float*>(a), k, &beta, static_cast<float*>(out), n);
    } else if (dtype_ == kFloat64) {
      status = cublasDgemm(handle_, op, CUBLAS_OP_N, n, m, k, &wide_one, w.const_data_ptr<double>(),
                           w_stride, static_cast<const double*>(a), k, &wide_beta,
                           static_cast<double*>(out), n);
    } else {
      const auto type = dtype_ == kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
      status =
          cublasGemmEx(handle_, op, CUBLAS_OP_N, n, m, k, &one, w.const_data_ptr(), type, w_stride,
                       a, type, k, &beta, out, type, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    }
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS,
                "fused_lstm: cuBLAS refused a product: ", cublasGetStatusString(status));
  }

 private:
  Dtype dtype_;
  cublasHandle_t handle_;
#else
  explicit StepProduct(const LayerCall& call) : options_(call.options) {}

  void operator()(int64_t rows, const void* a, const at::Tensor& w, Weight kind, bool add,
                  void* out) const {
    const at::Tensor b = kind == kTransposed ? w.t() : w;
    const at::Tensor left = at::from_blob(const_cast<void*>(a), {rows, b.size(0)}, options_);
    at::Tensor sum = at::from_blob(out, {rows, b.size(1)}, options_);
    if (add)
      at::addmm_out(sum, sum, left, b);
    else
      at::mm_out(sum, left, b);
  }

 private:
  at::TensorOptions options_;
#endif
};

}  // namespace fused_lstm::cuda
