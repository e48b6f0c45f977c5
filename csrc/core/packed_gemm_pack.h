// Packing, transposing and rounding for the products of packed_gemm.h.
//
// Compiled once for each instruction set, see simd.h; contracts in packed_gemm.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/bf16.h"
#include "core/packed_gemm.h"

namespace fastmtl::FASTMTL_ISA {

inline void round_bf16(int64_t rows, int64_t cols, const float* from, int64_t ld, Bf16* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      write(to + r * ld_to + c, to_bf16(load(from + r * ld + c)));
    }
    for (; c < cols; ++c) to[r * ld_to + c] = to_bf16(from[r * ld + c]);
  }
}

FASTMTL_INLINE Bf16 as_bf16(float value) { return to_bf16(value); }
FASTMTL_INLINE Bf16 as_bf16(Bf16 value) { return value; }

FASTMTL_INLINE H16 load_16(const Bf16* from) { return read<H16>(from); }
FASTMTL_INLINE H16 load_16(const float* from) { return to_bf16(load(from)); }

// a0 b0 a1 b1 ...
FASTMTL_INLINE U32 pairs_of(H16 a, H16 b) { return convert<U32>(a) | convert<U32>(b) << 16; }

// Sixteen rows of sixteen 32-bit numbers, transposed.
#if defined(__AVX512F__)
// (The masks are full: without one, gcc 12 takes the intrinsics for reads of uninitialised registers.)
FASTMTL_INLINE void transpose_16(U32 (&rows)[16]) {
  constexpr __mmask16 kAll = 0xFFFF;
  constexpr __mmask8 kAll8 = 0xFF;
  __m512i v[16], t[16];
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)rows[i].part[0];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, v[i], v[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_maskz_unpacklo_epi64(kAll8, t[i], t[i + 2]);
    v[i + 1] = _mm512_maskz_unpackhi_epi64(kAll8, t[i], t[i + 2]);
    v[i + 2] = _mm512_maskz_unpacklo_epi64(kAll8, t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_maskz_unpackhi_epi64(kAll8, t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int q = 0; q < 4; ++q) {
      t[i + q] = _mm512_maskz_shuffle_i32x4(kAll, v[i + q], v[i + 4 + q], 0x88);
      t[i + 4 + q] = _mm512_maskz_shuffle_i32x4(kAll, v[i + q], v[i + 4 + q], 0xDD);
    }
  }
  for (int q = 0; q < 8; ++q) {
    rows[q].part[0] = (U32::Part)_mm512_maskz_shuffle_i32x4(kAll, t[q], t[8 + q], 0x88);
    rows[8 + q].part[0] = (U32::Part)_mm512_maskz_shuffle_i32x4(kAll, t[q], t[8 + q], 0xDD);
  }
}
#elif defined(__AVX2__)
FASTMTL_INLINE void transpose_8(__m256i (&v)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int q = 0; q < 4; ++q) {
    t[q] = _mm256_permute2x128_si256(v[q], v[4 + q], 0x20);
    t[4 + q] = _mm256_permute2x128_si256(v[q], v[4 + q], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
FASTMTL_INLINE void transpose_16(U32 (&rows)[16]) {
  __m256i quarter[2][2][8];  // [half of the rows][half of the columns]
  for (int i = 0; i < 16; ++i) {
    for (int half = 0; half < 2; ++half) quarter[i / 8][half][i % 8] = (__m256i)rows[i].part[half];
  }
  for (auto& half : quarter) {
    for (auto& v : half) transpose_8(v);
  }
  for (int i = 0; i < 16; ++i) {
    for (int half = 0; half < 2; ++half) rows[i].part[half] = (U32::Part)quarter[half][i / 8][i % 8];
  }
}
#else
FASTMTL_INLINE void transpose_16(U32 (&rows)[16]) {
  U32 turned[16];
  for (int i = 0; i < 16; ++i) {
    for (int l = 0; l < 16; ++l) turned[i][l] = rows[l][i];
  }
  std::memcpy(rows, turned, sizeof(turned));
}
#endif

inline void pack_f32(int64_t n, int64_t k, const float* w, int64_t ld, bool by_depth, float* packed) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t lanes = std::min(kPanel, n - j);
    float* panel = packed + j * k;
    if (by_depth) {
      for (int64_t p = 0; p < k; ++p) store(panel + p * kPanel, load(w + p * ld + j, lanes));
      continue;
    }
    if (lanes < kPanel) std::fill(panel, panel + k * kPanel, 0.0f);
    int64_t start = 0;
    for (; lanes == kPanel && start + 16 <= k; start += 16) {
      U32 v[16];
      for (int l = 0; l < 16; ++l) v[l] = (U32)load(w + (j + l) * ld + start);
      transpose_16(v);
      for (int p = 0; p < 16; ++p) store(panel + (start + p) * kPanel, (F32)v[p]);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      for (int64_t p = start; p < k; ++p) panel[p * kPanel + l] = w[(j + l) * ld + p];
    }
  }
}

template <class T>
void pack_pairs(int64_t n, int64_t k, const T* w, int64_t ld, bool by_depth, Bf16* packed) {
  const int64_t depth = round_up(k, kPairDepth);
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t lanes = std::min(kPanel, n - j);
    Bf16* panel = packed + j * depth;
    if (by_depth && lanes == kPanel) {
      int64_t p = 0;
      for (; p + 2 <= k; p += 2) {
        write(panel + p * kPanel, pairs_of(load_16(w + p * ld + j), load_16(w + (p + 1) * ld + j)));
      }
      std::fill(panel + p * kPanel, panel + depth * kPanel, Bf16{0});
      if (p < k) {
        for (int64_t l = 0; l < kPanel; ++l) panel[p * kPanel + 2 * l] = as_bf16(w[p * ld + j + l]);
      }
      continue;
    }
    if (lanes < kPanel || k < depth) std::fill(panel, panel + depth * kPanel, Bf16{0});
    const int64_t step_lane = by_depth ? 1 : ld, step_depth = by_depth ? ld : 1;
    int64_t start = 0;
    // a row's pairs as 32-bit numbers, sixteen of each of sixteen rows
    for (; !by_depth && lanes == kPanel && start + 32 <= k; start += 32) {
      U32 v[16];
      for (int l = 0; l < 16; ++l) {
        Bf16 row[32];
        write(row, load_16(w + (j + l) * ld + start));
        write(row + 16, load_16(w + (j + l) * ld + start + 16));
        v[l] = read<U32>(row);
      }
      transpose_16(v);
      for (int p = 0; p < 16; ++p) write(panel + (start + 2 * p) * kPanel, v[p]);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      const T* from = w + (j + l) * step_lane;
      for (int64_t p = start; p < k; ++p) panel[(p & ~1) * kPanel + 2 * l + (p & 1)] = as_bf16(from[p * step_depth]);
    }
  }
}

inline void pack_bf16(int64_t n, int64_t k, const float* w, int64_t ld, bool by_depth, Bf16* packed) {
  pack_pairs(n, k, w, ld, by_depth, packed);
}
inline void repack_bf16(int64_t n, int64_t k, const Bf16* w, int64_t ld, bool by_depth, Bf16* packed) {
  pack_pairs(n, k, w, ld, by_depth, packed);
}

inline void transpose_bf16(int64_t rows, int64_t cols, const Bf16* from, int64_t ld, Bf16* to, int64_t ld_to) {
  const int64_t depth = round_up(rows, kPairDepth);
  int64_t r = 0;
  // as pairs of rows, each pair one 32-bit number
  for (; r + 32 <= rows; r += 32) {
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) {
      U32 v[16];
      for (int p = 0; p < 16; ++p) {
        const Bf16* pair = from + (r + 2 * p) * ld + c;
        v[p] = pairs_of(load_16(pair), load_16(pair + ld));
      }
      transpose_16(v);
      for (int i = 0; i < 16; ++i) write(to + (c + i) * ld_to + r, v[i]);
    }
    for (; c < cols; ++c) {
      for (int64_t i = 0; i < 32; ++i) to[c * ld_to + r + i] = from[(r + i) * ld + c];
    }
  }
  constexpr int64_t kTile = 32;
  for (; r < depth; r += kTile) {
    const int64_t stop = std::min(rows, r + kTile);
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t i = r; i < stop; ++i) to[c * ld_to + i] = from[i * ld + c];
      for (int64_t i = stop; i < r + kTile; ++i) to[c * ld_to + i] = 0;
    }
  }
}

}  // namespace fastmtl::FASTMTL_ISA
