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

FASTMTL_INLINE float dot(const float* a, const float* b, int64_t width) {
  F32 total{};
  for_columns(width,
              [&](int64_t c, auto n) __attribute__((always_inline)) { total += load(a + c, n) * load(b + c, n); });
  return sum(total);
}

struct ColumnConstants {
  F32 mean, scale, shift, alpha;
};
FASTMTL_INLINE ColumnConstants constants(const Tile& t, int64_t c, int64_t n) {
  return {load(t.mean + c, n), load(t.scale + c, n), load(t.shift + c, n), t.alpha ? load(t.alpha + c, n) : F32{}};
}

inline void column_stats(const float* z, int64_t ld, int64_t rows, int64_t cols, double* mean, double* m2) {
  for_columns(cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    F64 total{};
    for (int64_t r = 0; r < rows; ++r) total += wide(load(z + r * ld + c, n));
    const F64 exact = total / static_cast<double>(rows);
    const F32 centre = narrow(exact);
    F64 squares{};
    for (int64_t r = 0; r < rows; ++r) {
      const F32 d = load(z + r * ld + c, n) - centre;
      squares += wide(d * d);
    }
    const F64 rest = exact - wide(centre);  // what rounding the mean to fp32 has added
    squares -= static_cast<double>(rows) * rest * rest;
    for (int64_t i = 0; i < n; ++i) {
      mean[c + i] = exact[i];
      m2[c + i] = std::max(0.0, squares[i]);
    }
  });
}

template <class Act, bool kDropout>
void hidden_elementwise(const Tile& t, float* h, int64_t ld_h) {
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const ColumnConstants k = constants(t, c, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      const F32 y = (load(t.z + r * t.ld + c, n) - k.mean) * k.scale + k.shift;
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
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const ColumnConstants k = constants(t, c, n);
    F64 sum_dy{}, sum_dy_centred{}, sum_dalpha{};
    for (int64_t r = 0; r < t.rows; ++r) {
      const F32 centred = load(t.z + r * t.ld + c, n) - k.mean;
      const F32 y = centred * k.scale + k.shift;
      F32 d = load(dh + r * ld_dh + c, n);
      F32 mask;
      if constexpr (kDropout) {
        mask = dropout_mask(t.dropout, row_key(t.dropout.key, t.first_row + r), t.first_column + c);
        d *= mask;
      }
      const F32 g = Act::backward(y, d, k.alpha);
      sum_dy += wide(g);
      sum_dy_centred += wide(g) * wide(centred);
      if constexpr (Act::kLearned) sum_dalpha += wide(Act::dalpha(y, d));
      store(dy + r * ld_dy + c, g, n);
      if constexpr (kKeepHidden) {
        F32 value = Act::forward(y, k.alpha);
        if constexpr (kDropout) value *= mask;
        store(h + r * ld_h + c, value, n);
      }
    }
    add_to(sums.dy + c, sum_dy, n);
    add_to(sums.dy_centred + c, sum_dy_centred, n);
    if constexpr (Act::kLearned) add_to(sums.dalpha + c, sum_dalpha, n);
  });
}

inline void linear_grad(const Tile& t, float* dy, int64_t ld_dy, const double* mean_dy, const double* slope) {
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const F32 scale = load(t.scale + c, n);
    if (!mean_dy) {
      for (int64_t r = 0; r < t.rows; ++r) store(dy + r * ld_dy + c, scale * load(dy + r * ld_dy + c, n), n);
      return;
    }
    const F32 mean = load(t.mean + c, n);
    const F64 m = load(mean_dy + c, n), k = load(slope + c, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      const F64 centred = wide(load(t.z + r * t.ld + c, n) - mean);
      const F64 left = wide(load(dy + r * ld_dy + c, n)) - m - centred * k;
      store(dy + r * ld_dy + c, scale * narrow(left), n);
    }
  });
}

}  // namespace fastmtl::FASTMTL_ISA
