// Row-wise Adagrad: one number of state a row, the mean square of its gradients so far.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction. A row's squares are added in 16 partial sums and those in pairs, whatever the instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/optimizer_lanes.h"
#include "core/optimizer_rows.h"

namespace fastmtl::FASTMTL_ISA {

// One step of a row; without a gradient, `grad` is null.
inline void rowwise_step(const Step& s, float* p, float* mean_square, const float* grad, int64_t n) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  const auto add = [&](int64_t d, int64_t k) {
    const float g = grad ? __builtin_fmaf(p[d], s.l2, grad[d]) : p[d] * s.l2;
    sums[k] += g * g;
  };
  int64_t d = 0;
  for (; d + kSums <= n; d += kSums) {
    for (int64_t k = 0; k < kSums; ++k) add(d + k, k);
  }
  for (int64_t k = 0; d + k < n; ++k) add(d + k, k);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  *mean_square += sums[0] / static_cast<float>(n);
  const float root = std::sqrt(*mean_square) + s.eps;
  for (d = 0; d < n; ++d) {
    const float g = grad ? __builtin_fmaf(p[d], s.l2, grad[d]) : p[d] * s.l2;
    p[d] += s.neg_lr * g / root;
  }
}

// OptimizerKernels::replay and apply for this rule.
inline bool rowwise_replay(const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end,
                           int64_t upto) {
  const FlushTiny guard;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows ? rows[i] : i;
    if (t.last[row] >= upto) continue;
    if (t.last[row] + 1 < history.begin) return false;
    for (int64_t number = t.last[row] + 1; number <= upto; ++number) {
      const Step& step = history.steps[number - history.begin];
      if (step.l2 != 0.0f) rowwise_step(step, t.p + row * t.dim, t.first + row, nullptr, t.dim);
    }
    t.last[row] = static_cast<int32_t>(upto);
  }
  return true;
}

inline void rowwise_apply(const Table& t, const Step& step, int64_t number, const int64_t* rows, const float* grads,
                          int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 32;
  const FlushTiny guard;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      __builtin_prefetch(t.p + rows[i + kAhead] * t.dim, 1);
      __builtin_prefetch(t.first + rows[i + kAhead], 1);
    }
    rowwise_step(step, t.p + rows[i] * t.dim, t.first + rows[i], grads + i * t.dim, t.dim);
    t.last[rows[i]] = static_cast<int32_t>(number);
  }
}

}  // namespace fastmtl::FASTMTL_ISA
