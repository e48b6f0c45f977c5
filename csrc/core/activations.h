// The activations that act on each element alone: the value, its derivative times dh, and the gradient of the learned
// scalar. Those that look at a whole row of an expert (softmax, dice) are in row_activations.h.
//
// Compiled once for each instruction set, see simd.h. NaN goes through every one of them.
#pragma once

#include "core/simd.h"

namespace fastmtl::FASTMTL_ISA {

struct Linear {
  static constexpr bool kLearned = false, kRow = false;  // kRow: it looks at a whole row of an expert
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return y; }
  FASTMTL_INLINE static F32 backward(F32, F32 dh, F32) { return dh; }
};

struct Relu : Linear {
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return select(y < 0.0f, F32{}, y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) { return select(y <= 0.0f, F32{}, dh); }
};

struct LeakyRelu : Linear {
  static constexpr float kSlope = 0.01f;
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return select(y > 0.0f, y, kSlope * y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) { return select(y > 0.0f, dh, kSlope * dh); }
};

struct PRelu {
  static constexpr bool kLearned = true, kRow = false;
  FASTMTL_INLINE static F32 forward(F32 y, F32 alpha) { return select(y > 0.0f, y, alpha * y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32 alpha) { return select(y > 0.0f, dh, alpha * dh); }
  FASTMTL_INLINE static F32 dalpha(F32 y, F32 dh) { return select(y > 0.0f, F32{}, y * dh); }
};

struct Sigmoid : Linear {
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return sigmoid(y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) {
    const F32 s = sigmoid(y);
    return dh * s * (1.0f - s);
  }
};

struct Tanh : Linear {
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return tanh(y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) {
    const F32 t = tanh(y);
    return dh * (1.0f - t * t);
  }
};

struct Silu : Linear {
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return y * sigmoid(y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) {
    const F32 s = sigmoid(y);
    return dh * s * (1.0f + y * (1.0f - s));
  }
};

struct Gelu : Linear {
  FASTMTL_INLINE static F32 forward(F32 y, F32) { return y * normal_cdf(y); }
  FASTMTL_INLINE static F32 backward(F32 y, F32 dh, F32) {
    return dh * (normal_cdf(y) + y * 0.398942280f * exp(-0.5f * y * y));
  }
};

}  // namespace fastmtl::FASTMTL_ISA
