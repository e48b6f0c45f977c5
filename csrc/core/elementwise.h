// Kernels over tiles whose activation acts on each element alone: sixteen columns at a time, down the rows, so that a
// column's constants and sums stay in registers.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include <algorithm>

#include "core/activations.h"
#include "core/kernels.h"

namespace fastmtl::FASTMTL_ISA {

// A row's key, by splitmix64 (Steele et al., OOPSLA'14).
FASTMTL_INLINE uint64_t row_key(uint64_t key, int64_t row) {
  uint64_t x = key + 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(row) + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Sixteen columns from `column` on in the row of that key: 0 where dropped, else the scale.
FASTMTL_INLINE F32 dropout_mask(const Dropout& dropout, uint64_t key, int64_t column) {
  constexpr U32 kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // two rounds of a 32-bit finaliser, each with half of the row's key
  U32 x = (kIota + static_cast<uint32_t>(column)) * 0x9E3779B1u ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = (x ^ (x >> 16)) + static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  x = x ^ (x >> 16);
  return x < dropout.threshold ? F32{} : splat(dropout.scale);
}

// Calls f(column, lanes) for each sixteen columns; `lanes` is a compile-time 16 but for the last ones.
template <class F>
FASTMTL_INLINE void for_columns(int64_t cols, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < cols) f(c, cols - c);
}

struct ColumnConstants {
  F32 mean, rstd, scale, beta, alpha;
};
FASTMTL_INLINE ColumnConstants constants(const Tile& t, int64_t c, int64_t n) {
  return {load(t.mean + c, n), load(t.rstd + c, n), load(t.scale + c, n), load(t.beta + c, n),
          t.alpha ? load(t.alpha + c, n) : F32{}};
}

inline void column_stats(const float* z, int64_t ld, int64_t rows, int64_t cols, double* mean, double* m2) {
  for_columns(cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    // about a pivot, so that the sums stay small where the mean is large
    const F32 pivot = load(z + c, n);
    double total[kLanes] = {};
    for (int64_t start = 0; start < rows; start += kBlock) {
      const int64_t stop = std::min(rows, start + kBlock);
      F32 part{};
      for (int64_t r = start; r < stop; ++r) part += load(z + r * ld + c, n) - pivot;
      add_to(total, part, kLanes);
    }
    F32 centre;
    double rest[kLanes];  // what rounding the mean to fp32 leaves
    for (int64_t i = 0; i < kLanes; ++i) {
      const double exact = static_cast<double>(pivot[i]) + total[i] / static_cast<double>(rows);
      centre[i] = static_cast<float>(exact);
      rest[i] = exact - static_cast<double>(centre[i]);
      if (i < n) mean[c + i] = exact;
    }
    double squares[kLanes] = {};
    for (int64_t start = 0; start < rows; start += kBlock) {
      const int64_t stop = std::min(rows, start + kBlock);
      F32 part{};
      for (int64_t r = start; r < stop; ++r) {
        const F32 d = load(z + r * ld + c, n) - centre;
        part += d * d;
      }
      add_to(squares, part, kLanes);
    }
    for (int64_t i = 0; i < n; ++i) {
      m2[c + i] = std::max(0.0, squares[i] - static_cast<double>(rows) * rest[i] * rest[i]);
    }
  });
}

template <class Act, bool kDropout>
void hidden_elementwise(const Tile& t, float* h, int64_t ld_h) {
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const ColumnConstants k = constants(t, c, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      const F32 y = (load(t.z + r * t.ld + c, n) - k.mean) * k.scale + k.beta;
      F32 value = Act::forward(y, k.alpha);
      if constexpr (kDropout) {
        value *= dropout_mask(t.dropout, row_key(t.dropout.key, t.first_row + r), t.first_column + c);
      }
      store(h + r * ld_h + c, value, n);
    }
  });
}

template <class Act, bool kDropout, bool kKeepHidden>
void hidden_grad_elementwise(const Tile& t, const float* dh, int64_t ld_dh, float* dy, int64_t ld_dy,
                             const GradSums& sums, float* h, int64_t ld_h) {
  for (int64_t start = 0; start < t.rows; start += kBlock) {
    const int64_t stop = std::min(t.rows, start + kBlock);
    for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const ColumnConstants k = constants(t, c, n);
      F32 sum_dy{}, sum_dy_xhat{}, sum_dalpha{};
      for (int64_t r = start; r < stop; ++r) {
        const F32 centred = load(t.z + r * t.ld + c, n) - k.mean;
        const F32 y = centred * k.scale + k.beta;
        F32 d = load(dh + r * ld_dh + c, n);
        F32 mask;
        if constexpr (kDropout) {
          mask = dropout_mask(t.dropout, row_key(t.dropout.key, t.first_row + r), t.first_column + c);
          d *= mask;
        }
        const F32 g = Act::backward(y, d, k.alpha);
        sum_dy += g;
        sum_dy_xhat += g * (centred * k.rstd);
        if constexpr (Act::kLearned) sum_dalpha += Act::dalpha(y, d);
        store(dy + r * ld_dy + c, g, n);
        if constexpr (kKeepHidden) {
          F32 value = Act::forward(y, k.alpha);
          if constexpr (kDropout) value *= mask;
          store(h + r * ld_h + c, value, n);
        }
      }
      add_to(sums.dy + c, sum_dy, n);
      add_to(sums.dy_xhat + c, sum_dy_xhat, n);
      if constexpr (Act::kLearned) add_to(sums.dalpha + c, sum_dalpha, n);
    });
  }
}

inline void linear_grad(const Tile& t, float* dy, int64_t ld_dy, const float* mean_dy, const float* mean_dy_xhat) {
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const F32 scale = load(t.scale + c, n);
    if (!mean_dy) {
      for (int64_t r = 0; r < t.rows; ++r) store(dy + r * ld_dy + c, scale * load(dy + r * ld_dy + c, n), n);
      return;
    }
    const F32 mean = load(t.mean + c, n), rstd = load(t.rstd + c, n);
    const F32 m1 = load(mean_dy + c, n), m2 = load(mean_dy_xhat + c, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      const F32 xhat = (load(t.z + r * t.ld + c, n) - mean) * rstd;
      store(dy + r * ld_dy + c, scale * (load(dy + r * ld_dy + c, n) - m1 - xhat * m2), n);
    }
  });
}

}  // namespace fastmtl::FASTMTL_ISA
