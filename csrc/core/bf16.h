// Rounding between fp32 and bf16, to nearest, ties to even.
//
// Compiled once for each instruction set, see simd.h.
#pragma once

#include <cstring>

#include "core/packed_gemm.h"
#include "core/simd.h"

namespace fastmtl::FASTMTL_ISA {

// A quiet NaN stays one: rounding must not carry it into infinity.
FASTMTL_INLINE Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<Bf16>(bits >> 16 | 0x40);
  return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

FASTMTL_INLINE H16 to_bf16(F32 value) {
#ifdef __AVX512BF16__
  H16 v;
  v.part[0] = (H16::Part)_mm512_cvtneps_pbh(value.part[0]);
  return v;
#else
  const U32 bits = (U32)value;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = (bits >> 16) | 0x40u;
  const U32 halves = select(value == value, rounded, nan);
#if defined(__AVX2__) && !defined(__AVX512F__)
  H16 v;  // in one register, where gcc would join two halves in memory
  const __m256i packed = _mm256_packus_epi32((__m256i)halves.part[0], (__m256i)halves.part[1]);
  v.part[0] = (H16::Part)_mm256_permute4x64_epi64(packed, 0xD8);
  return v;
#else
  return convert<H16>(halves);
#endif
#endif
}

FASTMTL_INLINE float from_bf16(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

FASTMTL_INLINE F32 from_bf16(H16 value) { return (F32)(convert<U32>(value) << 16); }

// The first n lanes; the others are zero, and their memory is not touched.
FASTMTL_INLINE F32 load(const Bf16* from, int64_t n) {
  if (n >= kLanes) return from_bf16(read<H16>(from));
  H16 v{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  v.part[0] = (H16::Part)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from);
#else
  std::memcpy(&v, from, sizeof(Bf16) * static_cast<size_t>(n));
#endif
  return from_bf16(v);
}

// The first n lanes, rounded; as for store of fp32.
FASTMTL_INLINE void store(Bf16* to, F32 v, int64_t n) {
  const H16 rounded = to_bf16(v);
  if (n >= kLanes) return write(to, rounded);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), (__m256i)rounded.part[0]);
#else
  std::memcpy(to, &rounded, sizeof(Bf16) * static_cast<size_t>(n));
#endif
}

}  // namespace fastmtl::FASTMTL_ISA
