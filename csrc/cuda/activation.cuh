// The activations that Hopper's kernels have, as fastmtl/backends/triton/activations.py has them, and their
// derivatives. Quotients and powers by the device's approximations, some 1e-6 off: what is exact calls functions,
// around which registers are saved in memory.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "cuda/hopper.cuh"
#endif

namespace fastmtl::cuda {

enum Activation : int { kRelu, kLeakyRelu, kSilu };

template <int ACT>
__device__ __forceinline__ float activated(float y) {
  if constexpr (ACT == kRelu) return y < 0.0f ? 0.0f : y;
  if constexpr (ACT == kLeakyRelu) return y > 0.0f ? y : 0.01f * y;
  static_assert(ACT <= kSilu);
  return __fdividef(y, 1.0f + __expf(-y));
}

template <int ACT>
__device__ __forceinline__ uint32_t activated_pair(float low, float high) {
  if constexpr (ACT == kRelu) return packed_relu(low, high);
  return packed(activated<ACT>(low), activated<ACT>(high));
}

// The gradient of y where that of its activation is dh.
template <int ACT>
__device__ __forceinline__ float activated_back(float y, float dh) {
  if constexpr (ACT == kRelu) return y <= 0.0f ? 0.0f : dh;
  if constexpr (ACT == kLeakyRelu) return y > 0.0f ? dh : 0.01f * dh;
  static_assert(ACT <= kSilu);
  const float s = __fdividef(1.0f, 1.0f + __expf(-y));
  return dh * s * (1.0f + y * (1.0f - s));
}

}  // namespace fastmtl::cuda
