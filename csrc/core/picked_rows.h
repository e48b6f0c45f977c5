// Rows of small tables' sums, added up for each row of a batch, and the way back: what each of them is given.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include "core/elementwise.h"
#include "core/kernels.h"

namespace fastmtl::FASTMTL_ISA {

// f(column, vectors, lanes of each), columns in fours of vectors, so that a pick's place is computed once for all of
// them.
template <class F>
FASTMTL_INLINE void for_column_fours(int64_t cols, F&& f) {
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes) {
    f(c, std::integral_constant<int, kVectors>{}, std::integral_constant<int64_t, kLanes>{});
  }
  for_columns(cols - c, [&](int64_t rest, auto n)
                            __attribute__((always_inline)) { f(c + rest, std::integral_constant<int, 1>{}, n); });
}

inline void add_up(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks,
                   const float* sums, int64_t ld_sums, float* z, int64_t ld_z) {
  for_column_fours(cols, [&](int64_t c, auto vectors, auto n) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      F32 total[vectors] = {};
      for (int64_t i = 0; i < n_picks; ++i) {
        const float* from = sums + picks[r * ld_picks + i] * ld_sums + c;
        for (int q = 0; q < vectors; ++q) total[q] += load(from + q * kLanes, n);
      }
      for (int q = 0; q < vectors; ++q) store(z + r * ld_z + c + q * kLanes, total[q], n);
    }
  });
}

template <class T>
void sum_by_pick(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks, const T* dz,
                 int64_t ld_dz, float* sums, int64_t ld_sums) {
  for_column_fours(cols, [&](int64_t c, auto vectors, auto n) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      F32 v[vectors];
      for (int q = 0; q < vectors; ++q) v[q] = load(dz + r * ld_dz + c + q * kLanes, n);
      for (int64_t i = 0; i < n_picks; ++i) {
        float* to = sums + picks[r * ld_picks + i] * ld_sums + c;
        for (int q = 0; q < vectors; ++q) store(to + q * kLanes, load(to + q * kLanes, n) + v[q], n);
      }
    }
  });
}

}  // namespace fastmtl::FASTMTL_ISA
