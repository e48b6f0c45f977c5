// Rounding between fp32 and bf16, to nearest, ties to even.
//
// Compiled once for each instruction set, see simd.h.
#pragma once

#include <cstring>

#include "core/packed_gemm.h"
#include "core/simd.h"

namespace fastmtl::FASTMTL_ISA {

typedef uint16_t H16 __attribute__((vector_size(32)));

// A quiet NaN stays one: rounding must not carry it into infinity.
FASTMTL_INLINE Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<Bf16>(bits >> 16 | 0x40);
  return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

FASTMTL_INLINE H16 to_bf16(F32 value) {
#ifdef __AVX512BF16__
  return (H16)_mm512_cvtneps_pbh((__m512)value);
#else
  const U32 bits = (U32)value;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value == value ? rounded : nan, H16);
#endif
}

FASTMTL_INLINE float from_bf16(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

FASTMTL_INLINE F32 from_bf16(H16 value) { return (F32)(__builtin_convertvector(value, U32) << 16); }

// The first n lanes; the others are zero, and their memory is not touched.
FASTMTL_INLINE F32 load(const Bf16* from, int64_t n) {
  H16 v{};
  std::memcpy(&v, from, sizeof(Bf16) * static_cast<size_t>(n < kLanes ? n : kLanes));
  return from_bf16(v);
}

// The first n lanes, rounded; as for store of fp32.
FASTMTL_INLINE void store(Bf16* to, F32 v, int64_t n) {
  const H16 rounded = to_bf16(v);
  std::memcpy(to, &rounded, sizeof(Bf16) * static_cast<size_t>(n < kLanes ? n : kLanes));
}

}  // namespace fastmtl::FASTMTL_ISA
