// Rows of a table on their way into the caches.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/optimizer.h"

namespace fastmtl::FASTMTL_ISA {

// Fetches a row and its states, up to a width of 64.
[[gnu::always_inline]] inline void prefetch(const Table& t, int64_t row) {
  constexpr int64_t kLine = 64 / sizeof(float), kLines = 4;
  for (int64_t d = 0; d < std::min(t.dim, kLines * kLine); d += kLine) {
    __builtin_prefetch(t.p + row * t.dim + d, 1);
    if (t.first) __builtin_prefetch(t.first + row * t.dim + d, 1);
    if (t.second) __builtin_prefetch(t.second + row * t.dim + d, 1);
  }
}

inline bool all_zero(const float* x, int64_t n) {
  bool zero = n == 0 || x[0] == 0.0f;  // mostly that settles it
  if (!zero) return false;
  for (int64_t d = 0; d < n; ++d) zero &= x[d] == 0.0f;
  return zero;
}

}  // namespace fastmtl::FASTMTL_ISA
