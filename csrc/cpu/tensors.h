// What the bindings share: reading torch tensors as raw pointers, and making new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "boxed.h"
#include "core/pool.h"

namespace fastmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cpu(const Tensor& tensor, ScalarType dtype, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, not ", tensor.dim());
}

// The tensor itself, or a copy whose last dimension is dense and whose other strides are as a matrix product needs
// them.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.is_contiguous()) return tensor;
  const bool rows = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  if (rows && last > 0 && tensor.stride(last - 1) >= tensor.size(last)) return tensor;
  return torch::stable::contiguous(tensor);
}

// Uninitialised; large ones come from the pool and go back to it. The others are made below torch's dispatcher: a small
// model's batch needs thirty, and census' step became 1.5% shorter.
inline Tensor empty_pooled(std::vector<int64_t> sizes, ScalarType dtype, size_t bytes) {
  for (int64_t size : sizes) {
    // torch's own refusal would end the process
    STD_TORCH_CHECK(size >= 0 && !__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes) &&
                        bytes <= static_cast<size_t>(std::numeric_limits<int64_t>::max()),
                    "a result of ", size, " elements and more is too large");
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  if (bytes >= Pool::kLarge) {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(Pool::global().take(bytes), {sizes.data(), sizes.size()},
                                    {strides.data(), strides.size()}, cpu, dtype,
                                    [](void* data) { Pool::global().give(data); });
  }
  AtenTensorHandle made = nullptr;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type,
                                           aoti_torch_device_type_cpu(), 0, &made) == AOTI_TORCH_SUCCESS,
                  "a result of ", bytes, " bytes can't be made");
  return Tensor(made);
}
inline Tensor empty_f32(std::vector<int64_t> sizes) {
  return empty_pooled(std::move(sizes), ScalarType::Float, sizeof(float));
}
// fp32, contiguous.
inline Tensor empty_like_f32(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return empty_f32(std::move(sizes));
}

}  // namespace fastmtl
