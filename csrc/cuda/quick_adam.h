// Steps of Adam and AdamW, as many as a GPU can take: the bits of `move` in rules.h, without branches.
//
// The device's quotient and square root of float are an approximation, some fused multiply-adds, and a branch for the
// sizes at which a remainder would leave the normal numbers. Those branches keep four columns from being computed side
// by side, which is most of a replay's time. Here a step is 24 operations and two approximations, and no branch:
//  - v is kept 2^48 times as large, so that its square root's remainder is normal for each v above 0;
//  - lr * m, once it is rounded, is made 2^48 times as large, and its quotient taken back in the addition to the
//  weight;
//  - sqrt(v) / root is a product with 1 / root, rounded, and one correction by the exact remainder. (6,000 roots were
//    compared with a division for all 2^23 fractions: no bit differs.)
// Approximation and corrections are those of the device's own quotient and square root, one operation less each.
//
// What is too large (v from 2^80 on, a weight that is not finite, numbers of a step that are not ordinary) makes the
// weight NaN, and a NaN stays: it is looked at once, after all steps, and such columns are moved again by `move`.
// Not the bits of `move` are a v, and a weight that is moved, below 1.2e-38.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/rules.h"

namespace fastmtl::cuda {

constexpr int kQuickSteps = 64;  // a row that missed more is moved by `move`

#ifdef __CUDA_ARCH__
FASTMTL_BOTH float near_reciprocal(float a) {
  float found;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(a));
  return found;
}
FASTMTL_BOTH float near_inverse_root(float a) {
  float found;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(a));
  return found;
}
#else
// As good as the device's: the reciprocal a unit off in its last place.
FASTMTL_BOTH float near_reciprocal(float a) { return std::nextafter(1.0f / a, 0.0f); }
FASTMTL_BOTH float near_inverse_root(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
#endif

// A step's numbers, as the quick form wants them; aligned so that they are read 16 bytes at a time.
struct alignas(16) QuickStep {
  float l2, keep, fresh, far_square;
  float root, inverse, eps, neg_lr;
  float shrink, unused[3];
};

template <int R>
constexpr bool kIsQuick = R == kAdam || R == kAdamW;

constexpr float kFar = 0x1p48f, kNear = 0x1p-48f, kNearRoot = 0x1p-24f;
constexpr float kNan = __builtin_nanf("");

FASTMTL_BOTH QuickStep quick_step(const Step& s) {
  const bool ordinary = s.eps >= 0x1p-34f && s.eps <= 0x1p40f && s.root >= 0x1p-10f && s.root <= 1.0f &&
                        s.neg_lr >= -0x1p40f && s.neg_lr <= 0x1p40f;
  return {s.l2,     s.keep,
          s.fresh,  mul(s.fresh_square, kFar),
          s.root,   divide(1.0f, s.root),
          s.eps,    ordinary ? s.neg_lr : kNan,
          s.shrink, {}};
}

// v, 2^48 times as large. 0 is taken for something too small to be seen beside eps, which is 0 again at the way back.
FASTMTL_BOTH float far_second(float v) {
  const float far = mul(v, kFar);
  return far >= 0x1p-110f ? far : v >= 0.0f ? 0x1p-110f : kNan;
}

// One step of one number; `far` is its far_second.
template <bool kDecoupled>
FASTMTL_BOTH void quick_move(const QuickStep& s, float grad, float& p, float& first, float& far) {
  const float g = fused(p, s.l2, grad);
  if constexpr (kDecoupled) p = mul(p, s.shrink);
  first = fused(s.fresh, add(g, -first), first);
  far = fused(mul(s.far_square, g), g, mul(far, s.keep));
  const float y = near_inverse_root(far), about = mul(far, y);
  const float b = fused(fused(-about, about, far), mul(y, 0.5f), about);  // 2^24 sqrt(v)
  float q = mul(b, s.inverse);
  q = fused(fused(-s.root, q, b), s.inverse, q);
  const float divisor = fused(q, kNearRoot, s.eps);
  const float a = mul(mul(s.neg_lr, first), kFar);
  float r = near_reciprocal(divisor);
  r = fused(r, fused(-divisor, r, 1.0f), r);
  q = mul(a, r);
  q = fused(r, fused(-divisor, q, a), q);
  q = fused(r, fused(-divisor, q, a), q);
  p = fused(q, kNear, p);
}

}  // namespace fastmtl::cuda
