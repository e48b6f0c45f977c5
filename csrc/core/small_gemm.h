// A matrix product for small operands: sixteen columns of c at a time, some rows of it in registers.
//
// Compiled once for each instruction set, see simd.h; contract in kernels.h. An element of c is summed over k in
// several parts, which hides the latency of the addition and halves the rounding, and a deep one in stretches, beside
// whose sums the next one's terms are not small. The order is the same for all rows of a product. Where few_rows they
// are summed in more parts, as dot products are: a normalisation of so few blows their rounding up.
#pragma once

#include <algorithm>
#include <vector>

#include "core/elementwise.h"
#include "core/kernels.h"

namespace fastmtl::FASTMTL_ISA {

constexpr int64_t kStretch = 128;  // of k, whose sum is then added to the others'

// kRows rows of c from row i on, sixteen columns wide, summed over the k from p to stop in kParts: panel is [k, kLanes]
// with a row stride.
template <int kRows, int kParts>
FASTMTL_INLINE void stretch_of_rows(int64_t i, int64_t p, int64_t stop, const float* a, int64_t step_row,
                                    int64_t step_k, const float* panel, int64_t ld_panel, F32 (&total)[kParts][kRows]) {
  for (; p + kParts <= stop; p += kParts) {
    for (int part = 0; part < kParts; ++part) {
      const F32 row = load(panel + (p + part) * ld_panel);
      for (int r = 0; r < kRows; ++r) total[part][r] += a[(i + r) * step_row + (p + part) * step_k] * row;
    }
  }
  for (; p < stop; ++p) {
    const F32 row = load(panel + p * ld_panel);
    for (int r = 0; r < kRows; ++r) total[0][r] += a[(i + r) * step_row + p * step_k] * row;
  }
  for (int width = kParts / 2; width > 0; width /= 2) {
    for (int part = 0; part < width; ++part) {
      for (int r = 0; r < kRows; ++r) total[part][r] += total[part + width][r];
    }
  }
}

template <int kRows, int kParts>
FASTMTL_INLINE void product_rows(int64_t i, int64_t n, int64_t k, const float* a, int64_t step_row, int64_t step_k,
                                 const float* panel, int64_t ld_panel, float* c, int64_t ld_c, bool accumulate) {
  F32 sum[kParts][kRows] = {};
  stretch_of_rows<kRows, kParts>(i, 0, std::min(k, kStretch), a, step_row, step_k, panel, ld_panel, sum);
  for (int64_t p = kStretch; p < k; p += kStretch) {
    F32 more[kParts][kRows] = {};
    stretch_of_rows<kRows, kParts>(i, p, std::min(k, p + kStretch), a, step_row, step_k, panel, ld_panel, more);
    for (int r = 0; r < kRows; ++r) sum[0][r] += more[0][r];
  }
  for (int r = 0; r < kRows; ++r) {
    float* to = c + (i + r) * ld_c;
    store(to, accumulate ? load(to, n) + sum[0][r] : sum[0][r], n);
  }
}

inline void small_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, bool transpose_a, const float* b,
                       int64_t ld_b, bool transpose_b, float* c, int64_t ld_c, bool accumulate, bool few_rows) {
  const int64_t step_row = transpose_a ? 1 : ld_a, step_k = transpose_a ? ld_a : 1;
  std::vector<float> packed;
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = std::min(kLanes, n - j);
    const float* panel = b + j;
    int64_t ld_panel = ld_b;
    if (transpose_b || lanes < kLanes) {
      packed.resize(static_cast<size_t>(k * kLanes));
      const int64_t step_column = transpose_b ? ld_b : 1, step_p = transpose_b ? 1 : ld_b;
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t l = 0; l < lanes; ++l) packed[p * kLanes + l] = b[(j + l) * step_column + p * step_p];
        std::fill(&packed[p * kLanes] + lanes, &packed[p * kLanes] + kLanes, 0.0f);
      }
      panel = packed.data();
      ld_panel = kLanes;
    }
    int64_t i = 0;
    if (few_rows) {
      for (; i < m; ++i) product_rows<1, 8>(i, lanes, k, a, step_row, step_k, panel, ld_panel, c + j, ld_c, accumulate);
    }
    for (; i + 4 <= m; i += 4) {
      product_rows<4, 2>(i, lanes, k, a, step_row, step_k, panel, ld_panel, c + j, ld_c, accumulate);
    }
    // in the same parts: equal rows give equal results, wherever they lie
    for (; i < m; ++i) product_rows<1, 2>(i, lanes, k, a, step_row, step_k, panel, ld_panel, c + j, ld_c, accumulate);
  }
}

}  // namespace fastmtl::FASTMTL_ISA
