// Rows of small tables' sums, added up for each row of a batch, and the way back: what each of them is given.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include "core/elementwise.h"
#include "core/kernels.h"

namespace fastmtl::FASTMTL_ISA {

inline void add_up(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks,
                   const float* sums, int64_t ld_sums, float* z, int64_t ld_z) {
  for (int64_t r = 0; r < rows; ++r, picks += ld_picks, z += ld_z) {
    for_columns(cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
      F32 total{};
      for (int64_t i = 0; i < n_picks; ++i) total += load(sums + picks[i] * ld_sums + c, n);
      store(z + c, total, n);
    });
  }
}

// Columns in fours of vectors, so that a pick's place is computed once for all of them.
template <class T>
void sum_by_pick(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks, const T* dz,
                 int64_t ld_dz, float* sums, int64_t ld_sums) {
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      F32 v[kVectors];
      for (int q = 0; q < kVectors; ++q) v[q] = load(dz + r * ld_dz + c + q * kLanes, kLanes);
      for (int64_t i = 0; i < n_picks; ++i) {
        float* to = sums + picks[r * ld_picks + i] * ld_sums + c;
        for (int q = 0; q < kVectors; ++q) store(to + q * kLanes, load(to + q * kLanes) + v[q]);
      }
    }
  }
  for_columns(cols - c, [&](int64_t rest, auto n) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      const F32 v = load(dz + r * ld_dz + c + rest, n);
      for (int64_t i = 0; i < n_picks; ++i) {
        float* to = sums + picks[r * ld_picks + i] * ld_sums + c + rest;
        store(to, load(to, n) + v, n);
      }
    }
  });
}

}  // namespace fastmtl::FASTMTL_ISA
