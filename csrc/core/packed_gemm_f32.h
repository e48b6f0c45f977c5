// The fp32 product with a packed weight: some rows of some panels at a time in registers, the whole of k.
//
// Compiled once for each instruction set, see simd.h; contract in packed_gemm.h. Each element of the result is a chain
// of multiply-adds over k in its order, or where k is large the sum of several: the terms of a long chain are small
// beside their sum, and a panel of it with some rows of `a` must fit into the nearest cache.
#pragma once

#include "core/packed_gemm_pack.h"

namespace fastmtl::FASTMTL_ISA {

// A register, and what fits into them: kRows * kPanels * kRegs sums, a panel's row of each weight, one number of `a`.
// And how long a chain is at most, where `a` lies by rows and where it lies by depth, a line for each number of a
// chain.
#if defined(__AVX512F__)
constexpr int kRows = 8, kPanels = 3;
constexpr int64_t kRegLanes = 16, kChain = 384, kChainByDepth = 256;
#else
#if defined(__AVX2__)
constexpr int kRows = 6, kPanels = 1;
constexpr int64_t kRegLanes = 8;
#elif defined(__aarch64__)
constexpr int kRows = 4, kPanels = 1;
constexpr int64_t kRegLanes = 4;
#else
constexpr int kRows = 2, kPanels = 1;
constexpr int64_t kRegLanes = 4;
#endif
constexpr int64_t kChain = 256, kChainByDepth = 128;
#endif
constexpr int kRegs = kPanel / kRegLanes;  // of a panel
typedef float Reg __attribute__((vector_size(kRegLanes * sizeof(float))));

FASTMTL_INLINE Reg load_reg(const void* from) {
  Reg v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Loops over what lies in registers must be unrolled early, or gcc keeps it in memory.
#define FASTMTL_UNROLL _Pragma("GCC unroll 16")

template <int kR, int kQ>
FASTMTL_INLINE void clear_block(Reg (&total)[kR][kQ]) {
  FASTMTL_UNROLL for (int r = 0; r < kR; ++r) { FASTMTL_UNROLL for (int q = 0; q < kQ; ++q) total[r][q] = Reg{}; }
}

// The last panel has `lanes` columns.
template <int kR, int kQ>
FASTMTL_INLINE void store_block(const Reg (&total)[kR][kQ], int64_t lanes, float* c, int64_t ld_c, bool accumulate) {
  FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
    FASTMTL_UNROLL for (int q = 0; q < kQ; ++q) {
      float* to = c + r * ld_c + q * kRegLanes;
      const int64_t n = q + kRegs < kQ ? kRegLanes : lanes - (q + kRegs - kQ) * kRegLanes;
      if (n >= kRegLanes) {
        const Reg sum = accumulate ? load_reg(to) + total[r][q] : total[r][q];
        std::memcpy(to, &sum, sizeof(sum));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = accumulate ? to[i] + total[r][q][i] : total[r][q][i];
      }
    }
  }
}

// kR rows times kP panels, which are `step` apart.
template <int kR, int kP>
void block_f32(int64_t lanes, int64_t k, const float* a, int64_t ld_a, const float* panels, int64_t step, float* c,
               int64_t ld_c, bool accumulate) {
  Reg total[kR][kP * kRegs], w[kP * kRegs];
  clear_block(total);
  for (int64_t p = 0; p < k; ++p) {
    FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) {
      w[q] = load_reg(panels + q / kRegs * step + p * kPanel + q % kRegs * kRegLanes);
    }
    FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
      const float x = a[r * ld_a + p];
      FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) total[r][q] += x * w[q];
    }
  }
  store_block(total, lanes, c, ld_c, accumulate);
}

// The rows that are left when kR no longer fits, in halves.
template <int kR, int kP, class Block>
FASTMTL_INLINE void rows_of(int64_t m, const Block& block) {
  int64_t i = 0;
  for (; i + kR <= m; i += kR) block.template operator()<kR, kP>(i);
  if constexpr (kR > 1) {
    if (i < m)
      rows_of<kR / 2, kP>(
          m - i, [&]<int kLessR, int kSameP>(int64_t at) { block.template operator()<kLessR, kSameP>(i + at); });
  }
}

// All panels from column j on, kP at a time, the last of them of `lanes` columns. Four are taken as two and two: one
// alone loads more than it multiplies.
template <int kP, class Body>
FASTMTL_INLINE void panels_of(int64_t n, int64_t& j, const Body& body) {
  for (; j + (kP - 1) * kPanel < n; j += kP * kPanel) {
    if (kP == 3 && (n - j + kPanel - 1) / kPanel == 4) break;
    body.template operator()<kP>(j, std::min(kPanel, n - j - (kP - 1) * kPanel));
  }
  if constexpr (kP > 1) panels_of<kP - 1>(n, j, body);
}

// Asks for what lies ahead, spread evenly over the blocks of a product of m x n.
class Fetch {
 public:
  Fetch(const Ahead* ahead, int64_t m, int64_t n) : ahead_(ahead) {
    if (!ahead) return;
    int64_t rows = 0;
    for (int part = 0; part < ahead->count; ++part) rows += ahead->parts[part].rows;
    const int64_t blocks = m / kRows * (n / (kPanels * kPanel));
    share_ = rows / std::max<int64_t>(1, blocks) + 1;
  }
  FASTMTL_INLINE void some() {
    for (int64_t i = 0; i < share_ && part_ < ahead_->count; ++i) {
      const Ahead::Part& part = ahead_->parts[part_];
      const char* row = static_cast<const char*>(part.data) + row_ * part.stride_bytes;
      for (int64_t at = 0; at < part.row_bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
      if (++row_ < part.rows) continue;
      row_ = 0;
      ++part_;
    }
  }

 private:
  const Ahead* ahead_;
  int64_t share_ = 0, row_ = 0;
  int part_ = 0;
};

inline void gemm_f32(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* packed, float* c,
                     int64_t ld_c, bool accumulate, const Ahead* ahead) {
  Fetch fetch(ahead, m, n);
  int64_t start = 0;
  do {
    const int64_t depth = std::min(kChain, k - start);
    int64_t column = 0;
    panels_of<kPanels>(n, column, [&]<int kP>(int64_t j, int64_t lanes) {
      rows_of<kRows, kP>(m, [&]<int kR, int kSameP>(int64_t i) {
        fetch.some();
        block_f32<kR, kSameP>(lanes, depth, a + i * ld_a + start, ld_a, packed + j * k + start * kPanel, k * kPanel,
                              c + i * ld_c + j, ld_c, accumulate || start > 0);
      });
    });
    start += depth;
  } while (start < k);
}

// The same for a weight's gradient, whose operands both lie by depth: a has the block's rows side by side, b its
// columns.
template <int kR, int kP>
void block_by_depth(int64_t lanes, int64_t depth, const float* a, int64_t ld_a, const float* b, int64_t ld_b, float* c,
                    int64_t ld_c, bool accumulate) {
  Reg total[kR][kP * kRegs], w[kP * kRegs];
  clear_block(total);
  const auto add = [&](int64_t p) __attribute__((always_inline)) {
    // what the next blocks of rows want of a: the rows lie too far apart for the processor to foresee it
    __builtin_prefetch(a + p * ld_a + kPanel);
    FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
      const float x = a[p * ld_a + r];
      FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) total[r][q] += x * w[q];
    }
  };
  // a panel of less than kPanel columns is read beyond them, but for the rows where that would lead out of the matrix
  const int64_t beyond = kPanel - lanes, ld = std::max<int64_t>(1, ld_b);  // a single row may have any stride
  const int64_t whole = std::max<int64_t>(0, depth - (beyond + ld - 1) / ld);
  for (int64_t p = 0; p < whole; ++p) {
    FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) w[q] = load_reg(b + p * ld_b + q * kRegLanes);
    add(p);
  }
  for (int64_t p = whole; p < depth; ++p) {
    float row[kP * kPanel] = {};
    std::copy_n(b + p * ld_b, kP * kPanel - beyond, row);
    FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) w[q] = load_reg(row + q * kRegLanes);
    add(p);
  }
  store_block(total, lanes, c, ld_c, accumulate);
}

inline void wgrad_f32(int64_t m, int64_t n, int64_t k, const float* dz, int64_t ld_dz, const float* h, int64_t ld_h,
                      float* dw, int64_t ld_dw, bool accumulate) {
  int64_t row = 0;
  do {
    const int64_t depth = std::min(kChainByDepth, m - row);
    int64_t column = 0;
    panels_of<kPanels>(k, column, [&]<int kP>(int64_t j, int64_t lanes) {
      rows_of<kRows, kP>(n, [&]<int kR, int kSameP>(int64_t i) {
        block_by_depth<kR, kSameP>(lanes, depth, dz + row * ld_dz + i, ld_dz, h + row * ld_h + j, ld_h,
                                   dw + i * ld_dw + j, ld_dw, accumulate || row > 0);
      });
    });
    row += depth;
  } while (row < m);
}

}  // namespace fastmtl::FASTMTL_ISA
