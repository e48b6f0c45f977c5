// Embedding tables of few rows, folded into the linear layers that read them: what such a layer makes of a row of the
// table is computed once (when a model is packed, or once a training step, expert_gate_small.h), so that a lookup adds
// a row of sums instead of multiplying the embedding.
//
// Layout      the sums of all tables' rows lie one below the other, [R + 1, ld], and the last of them is zero, for ids
//             that add nothing. Line after line, as weights are read.
// Accumulation double while packing, each sum rounded once; fp32, in the tables' order, where they are added.
// Threading, determinism, aliasing: inference.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "core/kernels.h"
#include "core/packed_gemm.h"

namespace fastmtl {

// Memory on cache lines: a tile of a weight is loaded by lines.
template <class U>
struct OnLines {
  using value_type = U;
  OnLines() = default;
  template <class V>
  OnLines(const OnLines<V>&) {}
  U* allocate(size_t n) { return static_cast<U*>(::operator new(n * sizeof(U), std::align_val_t{64})); }
  void deallocate(U* data, size_t) { ::operator delete(data, std::align_val_t{64}); }
  bool operator==(const OnLines&) const { return true; }
};

class SmallTables {
 public:
  // `width`: columns of matrix 0. The tables' columns ascend and do not overlap.
  SmallTables(std::vector<SmallTable> tables, int64_t width) : tables_(std::move(tables)) {
    int64_t at = 0;
    for (const SmallTable& table : tables_) {
      for (; at < table.column; ++at) kept_.push_back(at);
      at = table.column + table.dim;
      first_rows_.push_back(rows_);
      rows_ += table.rows;
    }
    for (; at < width; ++at) kept_.push_back(at);
  }

  int64_t count() const { return static_cast<int64_t>(tables_.size()); }
  int64_t rows_of(int64_t t) const { return tables_[static_cast<size_t>(t)].rows; }
  // The number of a table's first row among all sums.
  int64_t first_row(int64_t t) const { return first_rows_[static_cast<size_t>(t)]; }
  int64_t zero_row() const { return rows_; }
  const std::vector<SmallTable>& all() const { return tables_; }
  int64_t kept_columns() const { return static_cast<int64_t>(kept_.size()); }

  // An odd number of cache lines, so that some columns of all rows use all sets of the cache.
  static int64_t stride(int64_t n) { return (round_up(n, kPanel) / kPanel | 1) * kPanel; }

  // Appends to `sums` those of a weight [n, width]; returns where they begin.
  int64_t append_sums(int64_t n, int64_t width, const float* weight, std::vector<float, OnLines<float>>& sums) const {
    const int64_t begin = static_cast<int64_t>(sums.size()), ld = stride(n);
    sums.resize(sums.size() + static_cast<size_t>((rows_ + 1) * ld));
    float* to = sums.data() + begin;
    for (const SmallTable& table : tables_) {
      for (int64_t v = 0; v < table.rows; ++v, to += ld) {
        const float* row = table.values + v * table.dim;
        for (int64_t i = 0; i < n; ++i) {
          const float* w = weight + i * width + table.column;
          double total = 0;
          for (int64_t d = 0; d < table.dim; ++d) total += static_cast<double>(row[d]) * static_cast<double>(w[d]);
          to[i] = static_cast<float>(total);
        }
      }
    }
    return begin;
  }

  // The columns of a weight [n, width] that are still multiplied, [n, kept_columns()]; `to` may be `weight`.
  void keep_columns(int64_t n, int64_t width, const float* weight, float* to) const {
    const int64_t k = kept_columns();
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t p = 0; p < k; ++p) to[i * k + p] = weight[i * width + kept_[static_cast<size_t>(p)]];
    }
  }

  // The other way: [n, kept_columns()] to their places in [n, width], whose other columns stay.
  void put_columns(int64_t n, int64_t width, const float* kept, float* to) const {
    const int64_t k = kept_columns();
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t p = 0; p < k; ++p) to[i * width + kept_[static_cast<size_t>(p)]] = kept[i * k + p];
    }
  }

 private:
  std::vector<SmallTable> tables_;
  std::vector<int64_t> kept_, first_rows_;
  int64_t rows_ = 0;
};

}  // namespace fastmtl
