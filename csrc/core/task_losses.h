// The tasks' losses and their gradient, from logits in one pass: sigmoid and binary cross-entropy as torch computes
// them one after the other (its clamps included), or the squared error.
//
// Compiled once for each instruction set, see simd.h; contract in kernels.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/kernels.h"
#include "core/simd.h"

namespace fastmtl::FASTMTL_ISA {

// What one element adds to its task's loss, and its gradient by the logit, for a factor of one.
struct LossParts {
  F32 loss, grad;
};

FASTMTL_INLINE LossParts cross_entropy(F32 z, F32 label) {
  // below, e^-z is more than fp32 holds, and torch's sigmoid is 0
  const F32 p = select(z < -88.7228394f, F32{}, sigmoid(z)), rest = 1.0f - p;
  const F32 log_p = log(p), log_rest = log1p_of_negative(p);
  const F32 floor = splat(-100.0f);
  const F32 loss =
      (label - 1.0f) * select(log_rest < floor, floor, log_rest) - label * select(log_p < floor, floor, log_p);
  const F32 spread = rest * p;
  const F32 grad = (p - label) / select(spread < 1e-12f, splat(1e-12f), spread) * spread;
  return {loss, grad};
}

FASTMTL_INLINE LossParts squared_error(F32 z, F32 label) {
  const F32 d = z - label;
  return {d * d, 2.0f * d};
}

inline void task_losses(int64_t rows, int64_t n_tasks, const float* logits, const float* labels,
                        const bool* is_classification, const float* factors, float* losses, float* grad) {
  std::vector<int64_t> known(static_cast<size_t>(n_tasks), 0);
  std::vector<double> totals(static_cast<size_t>(n_tasks), 0.0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < n_tasks; ++t) known[t] += !std::isnan(labels[r * n_tasks + t]);
  }
  std::vector<float> scale(static_cast<size_t>(n_tasks));
  for (int64_t t = 0; t < n_tasks; ++t) scale[t] = factors[t] / static_cast<float>(std::max<int64_t>(1, known[t]));
  const int64_t n = rows * n_tasks;
  int64_t task = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = std::min(kLanes, n - i);
    const F32 z = load(logits + i, lanes), label = load(labels + i, lanes);
    const LossParts binary = cross_entropy(z, label), real = squared_error(z, label);
    for (int64_t l = 0; l < lanes; ++l) {
      const bool is_known = !std::isnan(labels[i + l]);
      const LossParts& parts = is_classification[task] ? binary : real;
      totals[task] += is_known ? static_cast<double>(parts.loss[l]) : 0.0;
      grad[i + l] = is_known ? parts.grad[l] * scale[task] : 0.0f;
      if (++task == n_tasks) task = 0;
    }
  }
  for (int64_t t = 0; t < n_tasks; ++t) {
    losses[t] = static_cast<float>(totals[t] / static_cast<double>(std::max<int64_t>(1, known[t])));
  }
}

}  // namespace fastmtl::FASTMTL_ISA
