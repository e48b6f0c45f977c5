// What a linear layer makes of each row of small tables, and the way back; see expert_gate_small.h.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h. All lanes are columns of z: the weights
// that read the tables are turned once for sixteen of them.
#pragma once

#include <algorithm>
#include <vector>

#include "core/kernels.h"
#include "core/packed_gemm_pack.h"
#include "core/simd.h"

namespace fastmtl::FASTMTL_ISA {

inline int64_t columns_of(const SmallTable* tables, int64_t n_tables) {
  int64_t total = 0;
  for (int64_t t = 0; t < n_tables; ++t) total += tables[t].dim;
  return total;
}

// f(first column of the weights, how many, columns of tables before them) for tables side by side.
template <class F>
void for_neighbours(const SmallTable* tables, int64_t n_tables, const F& f) {
  int64_t before = 0;
  for (int64_t t = 0; t < n_tables;) {
    const int64_t first = tables[t].column;
    int64_t stop = first;
    for (; t < n_tables && tables[t].column == stop; ++t) stop += tables[t].dim;
    f(first, stop - first, before);
    before += stop - first;
  }
}

// The weights of at most sixteen columns of z that read the tables, [columns of tables][kPanel].
inline void pack_panel(const SmallTable* tables, int64_t n_tables, int64_t lanes, const float* weight, int64_t width,
                       float* panel) {
  for_neighbours(tables, n_tables, [&](int64_t first, int64_t n, int64_t before) {
    pack_f32(lanes, n, weight + first, width, false, panel + before * kPanel);
  });
}

// The other way.
inline void unpack_panel(const SmallTable* tables, int64_t n_tables, int64_t lanes, const float* panel, float* weight,
                         int64_t width) {
  for_neighbours(tables, n_tables, [&](int64_t first, int64_t n, int64_t before) {
    const float* from = panel + before * kPanel;
    float* to = weight + first;
    int64_t start = 0;
    for (; lanes == kPanel && start + 16 <= n; start += 16) {
      U32 v[16];
      for (int p = 0; p < 16; ++p) v[p] = (U32)load(from + (start + p) * kPanel);
      transpose_16(v);
      for (int l = 0; l < 16; ++l) store(to + l * width + start, (F32)v[l]);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      for (int64_t p = start; p < n; ++p) to[l * width + p] = from[p * kPanel + l];
    }
  });
}

template <int kRows>
FASTMTL_INLINE void fold_rows(const float* values, int64_t dim, const float* panel, float* sums, int64_t ld) {
  F32 total[kRows] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const F32 w = load(panel + d * kPanel);
    for (int r = 0; r < kRows; ++r) total[r] += values[r * dim + d] * w;
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * ld, total[r]);
}

inline void fold(const SmallTable* tables, int64_t n_tables, int64_t cols, const float* weight, int64_t width,
                 float* sums, int64_t ld_sums) {
  std::vector<float> panel(static_cast<size_t>(columns_of(tables, n_tables) * kPanel));
  for (int64_t c = 0; c < cols; c += kPanel) {
    pack_panel(tables, n_tables, std::min(kPanel, cols - c), weight + c * width, width, panel.data());
    const float* w = panel.data();
    float* to = sums + c;
    for (const SmallTable* table = tables; table < tables + n_tables; ++table) {
      int64_t v = 0;
      for (; v + 4 <= table->rows; v += 4, to += 4 * ld_sums) {
        fold_rows<4>(table->values + v * table->dim, table->dim, w, to, ld_sums);
      }
      for (; v < table->rows; ++v, to += ld_sums) {
        fold_rows<1>(table->values + v * table->dim, table->dim, w, to, ld_sums);
      }
      w += table->dim * kPanel;
    }
  }
}

// kDims columns of a table: what the weights of sixteen columns of z get from the sums of all its rows.
template <int kDims>
FASTMTL_INLINE void weights_of_table(const SmallTable& table, int64_t d, const float* sums, int64_t ld, float* panel) {
  F32 total[kDims] = {};
  for (int64_t v = 0; v < table.rows; ++v) {
    const F32 s = load(sums + v * ld);
    for (int i = 0; i < kDims; ++i) total[i] += table.values[v * table.dim + d + i] * s;
  }
  for (int i = 0; i < kDims; ++i) store(panel + i * kPanel, total[i]);
}

inline void fold_grad(const SmallTable* tables, int64_t n_tables, int64_t cols, const float* weight, int64_t width,
                      const float* sums, int64_t ld_sums, float* dweight, float* dvalues) {
  const int64_t n = columns_of(tables, n_tables) * kPanel;  // numbers of a panel
  const int64_t n_panels = (cols + kPanel - 1) / kPanel;
  std::vector<float> memory(static_cast<size_t>(std::max<int64_t>(1, dvalues ? n_panels : 1) * n));
  for (int64_t p = 0; p < n_panels; ++p) {
    const int64_t lanes = std::min(kPanel, cols - p * kPanel);
    const float* from = sums + p * kPanel;
    float* panel = memory.data();
    for (const SmallTable* table = tables; table < tables + n_tables; ++table, panel += table[-1].dim * kPanel) {
      int64_t d = 0;
      for (; d + 4 <= table->dim; d += 4) weights_of_table<4>(*table, d, from, ld_sums, panel + d * kPanel);
      for (; d < table->dim; ++d) weights_of_table<1>(*table, d, from, ld_sums, panel + d * kPanel);
      from += table->rows * ld_sums;
    }
    unpack_panel(tables, n_tables, lanes, memory.data(), dweight + p * kPanel * width, width);
  }
  if (!dvalues) return;
  for (int64_t p = 0; p < n_panels; ++p) {
    pack_panel(tables, n_tables, std::min(kPanel, cols - p * kPanel), weight + p * kPanel * width, width,
               memory.data() + p * n);
  }
  const float* w = memory.data();
  for (const SmallTable* table = tables; table < tables + n_tables; ++table, w += table[-1].dim * kPanel) {
    for (int64_t v = 0; v < table->rows; ++v, sums += ld_sums) {
      for (int64_t d = 0; d < table->dim; ++d) {
        F32 total{};
        for (int64_t p = 0; p < n_panels; ++p) total += load(sums + p * kPanel) * load(w + p * n + d * kPanel);
        *dvalues++ = sum(total);
      }
    }
  }
}

}  // namespace fastmtl::FASTMTL_ISA
