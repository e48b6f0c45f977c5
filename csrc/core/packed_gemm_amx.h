// The bf16 product with a packed weight on tiles (Intel AMX): up to 2 x 2 tiles of the result in registers, the whole
// of k. Contract in packed_gemm.h.
//
// Tile registers 0 to 3 hold the result, 4 and 5 sixteen rows of `a` and 32 of its columns each, 6 and 7 one step of a
// panel each. They are configured and released in every call, so that no other code finds them in use.
#pragma once

#include "core/packed_gemm_bf16.h"

#ifdef __AMX_BF16__

namespace fastmtl::FASTMTL_ISA {

// gcc's intrinsics do not say that they touch memory
#define FASTMTL_TILE_LOAD(tile, from, bytes) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(bytes)) : "memory")
#define FASTMTL_TILE_STORE(tile, to, bytes) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(bytes)) : "memory")
#define FASTMTL_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define FASTMTL_TILE_DOT(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

struct TileConfig {
  alignas(64) uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// `rows` rows of `a` and of the result in each tile, those in the second row of tiles `low` of them.
inline void configure(int64_t rows, int64_t low) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool second = tile == 2 || tile == 3 || tile == 5;
    config.bytes[tile] = kTileBytes;
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? kTileRows : second ? low : rows);
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void release() { __asm__ volatile("tilerelease" ::); }

// Up to 32 rows of `a`; `rest` holds the columns behind its last whole step, filled up with zeros.
struct TileRows {
  const Bf16* a;
  int64_t ld_a, steps;
  const Bf16* rest;  // [32, kPairDepth]; null where there is none
};

// What is added up in the tiles goes to c, or where it does not fit there, by way of a buffer.
template <bool kTwoRows, bool kTwoPanels>
FASTMTL_INLINE void block_tiles(const TileRows& rows, const Bf16* panels, int64_t step, float* c, int64_t ld_c,
                                bool accumulate) {
  const int64_t c_bytes = ld_c * static_cast<int64_t>(sizeof(float));
  if (accumulate) {
    FASTMTL_TILE_LOAD(0, c, c_bytes);
    if constexpr (kTwoPanels) FASTMTL_TILE_LOAD(1, c + kPanel, c_bytes);
    if constexpr (kTwoRows) FASTMTL_TILE_LOAD(2, c + kTileRows * ld_c, c_bytes);
    if constexpr (kTwoRows && kTwoPanels) FASTMTL_TILE_LOAD(3, c + kTileRows * ld_c + kPanel, c_bytes);
  } else {
    FASTMTL_TILE_ZERO(0);
    if constexpr (kTwoPanels) FASTMTL_TILE_ZERO(1);
    if constexpr (kTwoRows) FASTMTL_TILE_ZERO(2);
    if constexpr (kTwoRows && kTwoPanels) FASTMTL_TILE_ZERO(3);
  }
  const auto multiply = [&](const Bf16* a, int64_t a_bytes, const Bf16* a_low, const Bf16* w)
                            __attribute__((always_inline)) {
                              FASTMTL_TILE_LOAD(6, w, kTileBytes);
                              FASTMTL_TILE_LOAD(4, a, a_bytes);
                              FASTMTL_TILE_DOT(0, 4, 6);
                              if constexpr (kTwoPanels) {
                                FASTMTL_TILE_LOAD(7, w + step, kTileBytes);
                                FASTMTL_TILE_DOT(1, 4, 7);
                              }
                              if constexpr (kTwoRows) {
                                FASTMTL_TILE_LOAD(5, a_low, a_bytes);
                                FASTMTL_TILE_DOT(2, 5, 6);
                                if constexpr (kTwoPanels) FASTMTL_TILE_DOT(3, 5, 7);
                              }
                            };
  const int64_t a_bytes = rows.ld_a * static_cast<int64_t>(sizeof(Bf16));
  const Bf16* a_low = rows.a + kTileRows * rows.ld_a;
  const Bf16* w = panels;
  for (int64_t s = 0; s < rows.steps; ++s, w += kPairDepth * kPanel) {
    multiply(rows.a + s * kPairDepth, a_bytes, a_low + s * kPairDepth, w);
  }
  if (rows.rest) multiply(rows.rest, kTileBytes, rows.rest + kTileRows * kPairDepth, w);
  FASTMTL_TILE_STORE(0, c, c_bytes);
  if constexpr (kTwoPanels) FASTMTL_TILE_STORE(1, c + kPanel, c_bytes);
  if constexpr (kTwoRows) FASTMTL_TILE_STORE(2, c + kTileRows * ld_c, c_bytes);
  if constexpr (kTwoRows && kTwoPanels) FASTMTL_TILE_STORE(3, c + kTileRows * ld_c + kPanel, c_bytes);
}

template <bool kTwoRows>
void row_of_tiles(int64_t n_rows, int64_t n, const TileRows& rows, const Bf16* packed, int64_t depth, float* c,
                  int64_t ld_c, bool accumulate) {
  const int64_t step = depth * kPanel;
  int64_t j = 0;
  for (; j + 2 * kPanel <= n; j += 2 * kPanel) {
    block_tiles<kTwoRows, true>(rows, packed + j * depth, step, c + j, ld_c, accumulate);
  }
  for (; j < n; j += kPanel) {
    const int64_t lanes = std::min(kPanel, n - j);
    if (lanes == kPanel) {
      block_tiles<kTwoRows, false>(rows, packed + j * depth, step, c + j, ld_c, accumulate);
      continue;
    }
    alignas(64) float buffer[2 * kTileRows * kPanel];
    block_tiles<kTwoRows, false>(rows, packed + j * depth, step, buffer, kPanel, false);
    for (int64_t r = 0; r < n_rows; ++r) {
      float* to = c + r * ld_c + j;
      const F32 value = load(buffer + r * kPanel);
      store(to, accumulate ? load(to, lanes) + value : value, lanes);
    }
  }
}

// What lies ahead is not asked for: on tiles a product is over sooner than the memory could answer.
inline void gemm_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* packed, float* c,
                      int64_t ld_c, bool accumulate, const Ahead*) {
  if (m == 0 || n == 0) return;
  constexpr int64_t kHeight = 2 * kTileRows;
  const int64_t depth = round_up(k, kPairDepth), rest = k % kPairDepth;
  alignas(64) Bf16 buffer[kHeight * kPairDepth];
  if (rest) std::memset(buffer, 0, sizeof(buffer));
  for (int64_t i = 0; i < m; i += kHeight) {
    const int64_t height = std::min(kHeight, m - i);
    // the first block and a shorter last one
    if (i == 0 || height < kHeight) {
      configure(std::min(height, kTileRows), height > kTileRows ? height - kTileRows : kTileRows);
    }
    TileRows rows{a + i * ld_a, ld_a, k / kPairDepth, nullptr};
    if (rest) {
      for (int64_t r = 0; r < height; ++r) {
        std::memcpy(buffer + r * kPairDepth, rows.a + r * ld_a + k - rest, sizeof(Bf16) * rest);
      }
      rows.rest = buffer;
    }
    if (height > kTileRows) {
      row_of_tiles<true>(height, n, rows, packed, depth, c + i * ld_c, ld_c, accumulate);
    } else {
      row_of_tiles<false>(height, n, rows, packed, depth, c + i * ld_c, ld_c, accumulate);
    }
  }
  release();
}

}  // namespace fastmtl::FASTMTL_ISA

#endif
