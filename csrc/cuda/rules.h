// What one optimizer step does to a number of a table: core/optimizer.h's definition, for the device and for the host.
//
// Arithmetic  fp32, every operation rounded once, fused multiply-adds only where written: on the device by intrinsics
//             that the compiler may not contract, on the host by a build without contraction. The same bits as
//             core/optimizer_kernels.cpp, except that numbers below 1.2e-38 are not taken for zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/optimizer.h"

#ifdef __CUDACC__
#define FASTMTL_BOTH __host__ __device__ __forceinline__
#else
#define FASTMTL_BOTH inline
#endif

namespace fastmtl::cuda {

constexpr int kNoRule = -1;

#ifdef __CUDA_ARCH__
FASTMTL_BOTH float add(float a, float b) { return __fadd_rn(a, b); }
FASTMTL_BOTH float mul(float a, float b) { return __fmul_rn(a, b); }
FASTMTL_BOTH float divide(float a, float b) { return __fdiv_rn(a, b); }
FASTMTL_BOTH float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTMTL_BOTH float root_of(float a) { return __fsqrt_rn(a); }
#else
FASTMTL_BOTH float add(float a, float b) { return a + b; }
FASTMTL_BOTH float mul(float a, float b) { return a * b; }
FASTMTL_BOTH float divide(float a, float b) { return a / b; }
FASTMTL_BOTH float fused(float a, float b, float c) { return std::fma(a, b, c); }
FASTMTL_BOTH float root_of(float a) { return std::sqrt(a); }
#endif

template <int R>
constexpr bool kHasFirst = R != kNoRule && R != kSgd;
template <int R>
constexpr bool kHasSecond = R == kAdam || R == kAdamW;

// The gradient with its L2 term.
FASTMTL_BOTH float with_decay(const Step& s, float grad, float p) { return fused(p, s.l2, grad); }

// One step of one number; `g` is with_decay's. Not for the row-wise rule.
template <int R>
FASTMTL_BOTH void move(const Step& s, float g, float& p, float& first, float& second) {
  if constexpr (R == kSgd) {
    p = fused(g, s.neg_lr, p);
  } else if constexpr (R == kMomentum || R == kNesterov) {
    first = fused(g, s.fresh, mul(first, s.keep));
    p = fused(R == kNesterov ? fused(first, s.ahead, g) : first, s.neg_lr, p);
  } else if constexpr (R == kAdagrad) {
    first = fused(g, g, first);
    p = add(p, divide(mul(s.neg_lr, g), add(root_of(first), s.eps)));
  } else {
    if constexpr (R == kAdamW) p = mul(p, s.shrink);
    first = fused(s.fresh, add(g, -first), first);
    second = fused(mul(s.fresh_square, g), g, mul(second, s.keep));
    p = add(p, divide(mul(s.neg_lr, first), add(divide(root_of(second), s.root), s.eps)));
  }
}

// The row-wise rule, once `first` holds the row's new state.
FASTMTL_BOTH void move_rowwise(const Step& s, float g, float& p, float first) {
  p = add(p, divide(mul(s.neg_lr, g), add(root_of(first), s.eps)));
}

}  // namespace fastmtl::cuda
