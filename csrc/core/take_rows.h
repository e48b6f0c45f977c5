// Some rows of a matrix, copied side by side.
//
// Layout      rows of row_bytes each, one behind the other, in `from` as in `to`.
// Threading   none in here.
// Memory      rows further on are fetched ahead: each would be a wait for memory of its own otherwise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fastmtl {

constexpr int64_t kRowsAhead = 16;

inline void take_rows(const char* from, int64_t row_bytes, const int64_t* rows, int64_t n, char* to) {
  if (row_bytes == 0) return;  // and there may be no memory
  constexpr int64_t kLine = 64;
  const auto fetch = [&](int64_t i) {
    const char* row = from + rows[i] * row_bytes;
    for (int64_t at = 0; at < row_bytes; at += kLine) __builtin_prefetch(row + at);
  };
  for (int64_t i = 0; i < std::min(kRowsAhead, n); ++i) fetch(i);
  for (int64_t i = 0; i < n; ++i, to += row_bytes) {
    if (i + kRowsAhead < n) fetch(i + kRowsAhead);
    std::memcpy(to, from + rows[i] * row_bytes, static_cast<size_t>(row_bytes));
  }
}

}  // namespace fastmtl
