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

// What turns z of COLUMNS columns into the BatchNorm's output, of two neighbours side by side. It lies in shared
// memory.
template <int COLUMNS>
struct Normal {
  float mean_scale[COLUMNS / 2][4], beta[COLUMNS / 2][2];

  // The numbers of a column, from `stat` [4, pitch] (mean, 1 / sigma, gamma / sigma, beta) where that is not null.
  __device__ __forceinline__ void set(int column, const float* stat, int64_t pitch) {
    mean_scale[column / 2][column % 2] = stat ? stat[0] : 0.0f;
    mean_scale[column / 2][2 + column % 2] = stat ? stat[2 * pitch] : 0.0f;
    beta[column / 2][column % 2] = stat ? stat[3 * pitch] : 0.0f;
  }

  // Activations of 16 columns from `first` on in place of z, as load_blocks gives them.
  template <int ACT>
  __device__ __forceinline__ void activate(int first, uint32_t (&z)[4]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = first / 2 + 4 * j + static_cast<int>(threadIdx.x) % 4;
      const float4 known = *reinterpret_cast<const float4*>(mean_scale[at]);
      const float2 added = *reinterpret_cast<const float2*>(beta[at]);
#pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; ++i) {
        z[i] = activated_pair<ACT>((lower(z[i]) - known.x) * known.z + added.x,
                                   (upper(z[i]) - known.y) * known.w + added.y);
      }
    }
  }
};

}  // namespace fastmtl::cuda
