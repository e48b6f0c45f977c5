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

#else

template <int kR, int kP>
void block_bf16(int64_t lanes, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* panels, float* c, int64_t ld_c,
                bool accumulate) {
  constexpr int64_t kDepth = 128;
  float wide_a[kR * kDepth];
  Reg total[kR][kP * kRegs];
  clear_block(total);
  const int64_t step = round_up(k, kPairDepth) * kPanel;
  for (int64_t start = 0; start < k; start += kDepth) {
    const int64_t depth = std::min(kDepth, k - start);
    FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
      for (int64_t p = 0; p < depth; ++p) wide_a[r * kDepth + p] = from_bf16(a[r * ld_a + start + p]);
      if (depth % 2 == 1) wide_a[r * kDepth + depth] = 0;
    }
    for (int64_t p = 0; p < depth; p += 2) {
      Reg even[kP * kRegs], odd[kP * kRegs];
      FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) {
        const Bf16* pairs = panels + q / kRegs * step + (start + p) * kPanel + q % kRegs * 2 * kRegLanes;
        const RegBits bits = (RegBits)load_reg(pairs);
        even[q] = (Reg)(bits << 16);
        odd[q] = (Reg)(bits & 0xFFFF0000u);
      }
      FASTMTL_UNROLL for (int r = 0; r < kR; ++r) {
        const float x = wide_a[r * kDepth + p], y = wide_a[r * kDepth + p + 1];
        FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) total[r][q] += x * even[q];
        FASTMTL_UNROLL for (int q = 0; q < kP * kRegs; ++q) total[r][q] += y * odd[q];
      }
    }
  }
  store_block(total, lanes, c, ld_c, accumulate);
}

#endif

#ifndef __AMX_BF16__
inline void gemm_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* packed, float* c,
                      int64_t ld_c, bool accumulate, const Ahead* ahead) {
  const int64_t depth = round_up(k, kPairDepth);
  Fetch fetch(ahead, m, n);
  int64_t column = 0;
  panels_of<kPanels>(m, n, column, [&]<int kR, int kP>(int64_t i, int64_t j, int64_t lanes) {
    fetch.some();
    block_bf16<kR, kP>(lanes, k, a + i * ld_a, ld_a, packed + j * depth, c + i * ld_c + j, ld_c, accumulate);
  });
}
#endif

}  // namespace fastmtl::FASTMTL_ISA
