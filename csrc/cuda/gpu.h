// A GPU as ops run kernels on it: torch's current stream and memory of torch's, and what ops check of tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

// torch exports it; its header declares it only to those who see all of CUDA's
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastmtl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

class Gpu {
 public:
  explicit Gpu(const Tensor& like) : device_(like.device()), guard_(device_.index()) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream) == 0, "torch names no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_.index()), "multiprocessors");
    multiprocessors_ = count;
  }
  template <class T>
  T* scratch(int64_t n) {
    return static_cast<T*>(bytes(std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(T))));
  }
  template <class T>
  void zero(T* at, int64_t n) {
    check(cudaMemsetAsync(at, 0, static_cast<size_t>(n) * sizeof(T), stream_), "memset");
  }
  template <class... Parameters, class... Args>
  void run_threads(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, Args... args) {
    constexpr int64_t kWithoutAsking = 48 * 1024;
    if (shared > kWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            "shared memory");
    }
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared), stream_>>>(
        args...);
    check(cudaGetLastError(), "launch");
  }
  int64_t multiprocessors() const { return multiprocessors_; }

 protected:
  void* bytes(int64_t n) {
    memory_.push_back(torch::stable::empty({n}, ScalarType::Byte, std::nullopt, device_));
    return memory_.back().mutable_data_ptr();
  }
  cudaStream_t stream_ = nullptr;

 private:
  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  int64_t multiprocessors_ = 1;
  std::vector<Tensor> memory_;  // torch gives it to others only behind what this stream does with it
};

inline void check_tensor(const Tensor& tensor, ScalarType dtype, std::vector<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, " must be contiguous on a GPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = sizes[i] < 0 || tensor.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, name, " has the wrong shape");
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

}  // namespace fastmtl::cuda
