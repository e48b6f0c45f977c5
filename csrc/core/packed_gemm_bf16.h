// The bf16 product with a packed weight without tiles: by the processor's dot products of pairs where it has them,
// otherwise widened to fp32. And the product of a weight's gradient, on whichever product there is.
//
// Compiled once for each instruction set, see simd.h; contract in packed_gemm.h.
#pragma once

#include "core/packed_gemm_f32.h"

namespace fastmtl::FASTMTL_ISA {

#ifdef __AVX512BF16__

FASTMTL_INLINE Reg pair_dot(Reg total, uint32_t pair, const Bf16* w) {
  __m512i weights;
  std::memcpy(&weights, w, sizeof(weights));
  return (Reg)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(pair)),
                               (__m512bh)weights);
}

template <int kR, int kP>
void block_bf16(int64_t lanes, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* panels, float* c, int64_t ld_c,
                bool accumulate) {
  Reg total[kR][kP * kRegs];
  clear_block(total);
  const int64_t step = round_up(k, kPairDepth) * kPanel;
  int64_t p = 0;
  for (; p + 2 <= k; p += 2) {
    FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + r * ld_a + p, sizeof(pair));
      FASTMTL_UNROLL for (int j = 0; j < kP; ++j) total[r][j] =
          pair_dot(total[r][j], pair, panels + j * step + p * kPanel);
    }
  }
  if (p < k) {
    FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
      FASTMTL_UNROLL for (int j = 0; j < kP; ++j) total[r][j] =
          pair_dot(total[r][j], a[r * ld_a + p], panels + j * step + p * kPanel);
    }
  }
  store_block(total, lanes, c, ld_c, accumulate);
}

#ifndef __AMX_BF16__
inline void gemm_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* packed, float* c,
                      int64_t ld_c, bool accumulate, const Ahead* ahead) {
  const int64_t depth = round_up(k, kPairDepth);
  Fetch fetch(ahead, m, n);
  int64_t column = 0;
  panels_of<kPanels>(n, column, [&]<int kP>(int64_t j, int64_t lanes) {
    rows_of<kRows, kP>(m, [&]<int kR, int kSameP>(int64_t i) {
      fetch.some();
      block_bf16<kR, kSameP>(lanes, k, a + i * ld_a, ld_a, packed + j * depth, c + i * ld_c + j, ld_c, accumulate);
    });
  });
}
#endif
#else

// Pairs of a panel's rows, one below the other: to [depth, kPanel], an odd depth filled up with a row of zeros.
inline void widen_panel(int64_t depth, const Bf16* pairs, float* to) {
  for (int64_t p = 0; p < depth; p += 2) {
    const U32 both = read<U32>(pairs + p * kPanel);
    store(to + p * kPanel, (F32)(both << 16));
    store(to + (p + 1) * kPanel, (F32)(both & 0xFFFF0000u));
  }
}

// Both operands are widened some rows and panels at a time, in the nearest caches: once for many blocks, whose
// registers then see fp32 alone.
inline void gemm_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* packed, float* c,
                      int64_t ld_c, bool accumulate, const Ahead* ahead) {
  constexpr int64_t kSomeRows = 96, kLd = kChain + kPanel;  // an odd number of lines, which uses all of a cache
  alignas(64) float rows[kSomeRows * kLd], panels[kPanels * kPanel * kChain];
  const int64_t depth_packed = round_up(k, kPairDepth);
  Fetch fetch(ahead, m, n);
  for (int64_t first = 0; first < m; first += kSomeRows) {
    const int64_t some = std::min(kSomeRows, m - first);
    int64_t start = 0;
    do {
      const int64_t depth = std::min(kChain, k - start);
      for (int64_t r = 0; r < some; ++r) {
        const Bf16* from = a + (first + r) * ld_a + start;
        int64_t p = 0;
        for (; p + kLanes <= depth; p += kLanes) store(rows + r * kLd + p, from_bf16(load_16(from + p)));
        if (p < depth) store(rows + r * kLd + p, load(from + p, depth - p));
      }
      int64_t column = 0;
      panels_of<kPanels>(n, column, [&]<int kP>(int64_t j, int64_t lanes) {
        for (int p = 0; p < kP; ++p) {
          widen_panel(depth, packed + (j + p * kPanel) * depth_packed + start * kPanel, panels + p * kPanel * kChain);
        }
        rows_of<kRows, kP>(some, [&]<int kR, int kSameP>(int64_t i) {
          fetch.some();
          block_f32<kR, kSameP>(lanes, depth, rows + i * kLd, kLd, panels, kPanel * kChain, c + (first + i) * ld_c + j,
                                ld_c, accumulate || start > 0);
        });
      });
      start += depth;
    } while (start < k);
  }
}

#endif

}  // namespace fastmtl::FASTMTL_ISA
