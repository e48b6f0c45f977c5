// Kernels over tiles whose activation acts on each element alone: sixteen columns at a time, down the rows, so that a
// column's constants and sums stay in registers.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include <algorithm>

#include "core/activations.h"
#include "core/bf16.h"
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
  alignas(64) static constexpr uint32_t kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // two rounds of a 32-bit finaliser, each with half of the row's key
  U32 x = (read<U32>(kIota) + static_cast<uint32_t>(column)) * 0x9E3779B1u ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  x = (x ^ (x >> 16)) + static_cast<uint32_t>(key >> 32);
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  x = x ^ (x >> 16);
  return select(x < dropout.threshold, F32{}, splat(dropout.scale));
}

// Calls f(column, lanes) for each sixteen columns; `lanes` is a compile-time 16 but for the last ones.
template <class F>
FASTMTL_INLINE void for_columns(int64_t cols, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < cols) f(c, cols - c);
}

// The same for two lines of the cache at a time where there are as many: a row of a wide matrix lies far from the next,
// and a processor fetches lines in pairs. f(column, vectors, lanes of each).
constexpr int kPair = 2;
template <class F>
FASTMTL_INLINE void for_column_pairs(int64_t cols, F&& f) {
  int64_t c = 0;
  for (; c + kPair * kLanes <= cols; c += kPair * kLanes) {
    f(c, std::integral_constant<int, kPair>{}, std::integral_constant<int64_t, kLanes>{});
  }
  for_columns(cols - c, [&](int64_t rest, auto n)
                            __attribute__((always_inline)) { f(c + rest, std::integral_constant<int, 1>{}, n); });
}

template <class A>
FASTMTL_INLINE float dot(const A* a, const float* b, int64_t width) {
  F32 total{};
  for_columns(width,
              [&](int64_t c, auto n) __attribute__((always_inline)) { total += load(a + c, n) * load(b + c, n); });
  return sum(total);
}

struct ColumnConstants {
  F32 mean, scale, shift, alpha;
};
template <class T>
FASTMTL_INLINE ColumnConstants constants(const Tile<T>& t, int64_t c, int64_t n) {
  return {load(t.mean + c, n), load(t.scale + c, n), load(t.shift + c, n), t.alpha ? load(t.alpha + c, n) : F32{}};
}

// Calls f(r, sums) for each row; what f adds to the sums, kSums of each of kVectors vectors, is added up in double
// every kSumRows rows.
template <int kSumRows, int kVectors, int kSums, class F>
FASTMTL_INLINE void sum_rows(int64_t rows, F64 (&totals)[kVectors][kSums], F&& f) {
  for (int64_t start = 0; start < rows; start += kSumRows) {
    F32 sums[kVectors][kSums] = {};
    const int64_t stop = std::min(rows, start + kSumRows);
    for (int64_t r = start; r < stop; ++r) f(r, sums);
    for (int v = 0; v < kVectors; ++v) {
      for (int s = 0; s < kSums; ++s) totals[v][s] += wide(sums[v][s]);
    }
  }
}

template <bool kExact, class T>
void column_stats_of(const float* z, int64_t ld, int64_t rows, int64_t cols, double* mean, double* m2, T* kept,
                     int64_t ld_kept) {
  constexpr int kSumRows = kExact ? 1 : 16;
  for_column_pairs(cols, [&](int64_t first, auto vectors, auto n) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    // fp32 sums of distances from the first row lose nothing where the mean is large beside the deviation
    F32 origin[kVectors] = {}, centre[kVectors];
    F64 exact[kVectors][1] = {}, squares[kVectors][1] = {};
    for (int v = 0; v < kVectors && !kExact; ++v) origin[v] = load(z + first + v * kLanes, n);
    sum_rows<kSumRows>(rows, exact, [&](int64_t r, auto& sums) __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) sums[v][0] += load(z + r * ld + first + v * kLanes, n) - origin[v];
    });
    for (int v = 0; v < kVectors; ++v) {
      exact[v][0] = exact[v][0] / static_cast<double>(rows) + wide(origin[v]);
      centre[v] = narrow(exact[v][0]);
    }
    sum_rows<kSumRows>(rows, squares, [&](int64_t r, auto& sums) __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) {
        const F32 value = load(z + r * ld + first + v * kLanes, n), d = value - centre[v];
        sums[v][0] += d * d;
        if (kept) store(kept + r * ld_kept + first + v * kLanes, value, n);
      }
    });
    for (int v = 0; v < kVectors; ++v) {
      const F64 rest = exact[v][0] - wide(centre[v]);  // what rounding the mean to fp32 has added
      squares[v][0] -= static_cast<double>(rows) * rest * rest;
      for (int64_t i = 0; i < n; ++i) {
        mean[first + v * kLanes + i] = exact[v][0][i];
        m2[first + v * kLanes + i] = std::max(0.0, squares[v][0][i]);
      }
    }
  });
}

template <class T>
void column_stats(const float* z, int64_t ld, int64_t rows, int64_t cols, bool exact, double* mean, double* m2, T* kept,
                  int64_t ld_kept) {
  if (exact) {
    column_stats_of<true>(z, ld, rows, cols, mean, m2, kept, ld_kept);
  } else {
    column_stats_of<false>(z, ld, rows, cols, mean, m2, kept, ld_kept);
  }
}

// Some columns go down the rows before the next ones do, a jump that the processor does not foresee: in each row they
// ask for what the next columns read there, or write.
template <int kWrite = 0>
FASTMTL_INLINE void ask_for(const void* place) {
  __builtin_prefetch(place, kWrite);
}

template <class Act, bool kDropout, class T, class H>
void hidden_elementwise(const Tile<T>& t, H* h, int64_t ld_h) {
  for_column_pairs(t.cols, [&](int64_t first, auto vectors, auto n) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    ColumnConstants k[kVectors];
    for (int v = 0; v < kVectors; ++v) k[v] = constants(t, first + v * kLanes, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      ask_for(t.z + r * t.ld + first + kVectors * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = first + v * kLanes;
        const F32 y = (load(t.z + r * t.ld + c, n) - k[v].mean) * k[v].scale + k[v].shift;
        F32 value = Act::forward(y, k[v].alpha);
        if constexpr (kDropout) {
          value *= dropout_mask(t.dropout, row_key(t.dropout.key, t.first_row + r), t.first_column + c);
        }
        store(h + r * ld_h + c, value, n);
      }
    }
  });
}

template <class Act, bool kDropout, class T>
void hidden_grad_elementwise(const Tile<T>& t, const float* dh, int64_t ld_dh, T* dy, int64_t ld_dy,
                             const GradSums& sums) {
  for_column_pairs(t.cols, [&](int64_t first, auto vectors, auto n) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    ColumnConstants k[kVectors];
    for (int v = 0; v < kVectors; ++v) k[v] = constants(t, first + v * kLanes, n);
    F64 totals[kVectors][3] = {};
    const auto row = [&](int64_t r, auto& near) __attribute__((always_inline)) {
      ask_for(t.z + r * t.ld + first + kVectors * kLanes);
      ask_for<1>(dy + r * ld_dy + first + kVectors * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = first + v * kLanes;
        const F32 centred = load(t.z + r * t.ld + c, n) - k[v].mean;
        const F32 y = centred * k[v].scale + k[v].shift;
        F32 d = load(dh + r * ld_dh + c, n);
        if constexpr (kDropout) {
          d *= dropout_mask(t.dropout, row_key(t.dropout.key, t.first_row + r), t.first_column + c);
        }
        const F32 g = Act::backward(y, d, k[v].alpha);
        if constexpr (std::is_same_v<T, Bf16>) {
          near[v][0] += g;
          near[v][1] += g * centred;
          if constexpr (Act::kLearned) near[v][2] += Act::dalpha(y, d);
        } else {
          // in double: an error of these sums would be one of dz in the same direction in every row
          totals[v][0] += wide(g);
          totals[v][1] += wide(g) * wide(centred);
          if constexpr (Act::kLearned) totals[v][2] += wide(Act::dalpha(y, d));
        }
        store(dy + r * ld_dy + c, g, n);
      }
    };
    sum_rows<16>(t.rows, totals, row);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kLanes;
      add_to(sums.dy + c, totals[v][0], n);
      add_to(sums.dy_centred + c, totals[v][1], n);
      if constexpr (Act::kLearned) add_to(sums.dalpha + c, totals[v][2], n);
    }
  });
}

// dy -> dz with fp32 constants.
template <bool kStatistics, class T>
void linear_grad_near(const Tile<T>& t, const T* dy, int64_t ld_dy, const double* mean_dy, const double* slope, T* dz,
                      int64_t ld_dz) {
  for_column_pairs(t.cols, [&](int64_t first, auto vectors, auto n) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    // the constants' rests: rounding them would err in the same direction in every row (in bf16 the rows' own are
    // larger)
    F32 mean[kVectors] = {}, scale[kVectors], m[kVectors] = {}, k[kVectors] = {};
    F32 rest_m[kVectors] = {}, rest_k[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = first + v * kLanes;
      scale[v] = load(t.scale + c, n);
      if constexpr (kStatistics) {
        mean[v] = load(t.mean + c, n);
        const F64 exact_m = load(mean_dy + c, n), exact_k = load(slope + c, n);
        m[v] = narrow(exact_m);
        k[v] = narrow(exact_k);
        rest_m[v] = narrow(exact_m - wide(m[v]));
        rest_k[v] = narrow(exact_k - wide(k[v]));
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      ask_for(t.z + r * t.ld + first + kVectors * kLanes);
      ask_for(dy + r * ld_dy + first + kVectors * kLanes);
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = first + v * kLanes;
        F32 left = load(dy + r * ld_dy + c, n);
        if constexpr (kStatistics) {
          const F32 centred = load(t.z + r * t.ld + c, n) - mean[v];
          left = left - m[v] - centred * k[v];
          if constexpr (!std::is_same_v<T, Bf16>) left -= rest_m[v] + centred * rest_k[v];
        }
        store(dz + r * ld_dz + c, scale[v] * left, n);
      }
    }
  });
}

template <class T>
void linear_grad_rows(const Tile<T>& t, const T* dy, int64_t ld_dy, const double* mean_dy, const double* slope, T* dz,
                      int64_t ld_dz) {
  if (!mean_dy) return linear_grad_near<false>(t, dy, ld_dy, mean_dy, slope, dz, ld_dz);
  if (!t.exact) return linear_grad_near<true>(t, dy, ld_dy, mean_dy, slope, dz, ld_dz);
  for_columns(t.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const F32 scale = load(t.scale + c, n), mean = load(t.mean + c, n);
    const F64 m = load(mean_dy + c, n), k = load(slope + c, n);
    for (int64_t r = 0; r < t.rows; ++r) {
      const F64 centred = wide(load(t.z + r * t.ld + c, n) - mean);
      const F64 left = wide(load(dy + r * ld_dy + c, n)) - m - centred * k;
      store(dz + r * ld_dz + c, scale * narrow(left), n);
    }
  });
}

}  // namespace fastmtl::FASTMTL_ISA
