// Functions of sixteen floats at a time, the same on every instruction set but for the last bits.
//
// Compiled once for each instruction set, see sixteen.h.
#pragma once

#include "core/sixteen.h"

namespace fastmtl::FASTMTL_ISA {

FASTMTL_INLINE F32 load(const float* from) { return read<F32>(from); }
FASTMTL_INLINE void store(float* to, F32 v) { write(to, v); }

#if defined(__AVX2__) && !defined(__AVX512F__)
FASTMTL_INLINE __m256i lane_mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n lanes; the others are zero (load) or left alone (store), and their memory is not touched.
FASTMTL_INLINE F32 load(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
#if defined(__AVX512F__)
  F32 v;
  v.part[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  return v;
#elif defined(__AVX2__)
  F32 v;
  v.part[0] = _mm256_maskload_ps(from, lane_mask(n));
  v.part[1] = _mm256_maskload_ps(from + 8, lane_mask(n - 8));
  return v;
#else
  F32 v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
#endif
}
FASTMTL_INLINE void store(float* to, F32 v, int64_t n) {
  if (n >= kLanes) return store(to, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), v.part[0]);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, lane_mask(n), v.part[0]);
  _mm256_maskstore_ps(to + 8, lane_mask(n - 8), v.part[1]);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
#endif
}

FASTMTL_INLINE F64 wide(F32 v) { return convert<F64>(v); }
FASTMTL_INLINE F32 narrow(F64 v) { return convert<F32>(v); }

FASTMTL_INLINE F64 load(const double* from, int64_t n) {
  if (n >= kLanes) return read<F64>(from);
  F64 v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}

FASTMTL_INLINE void add_to(double* to, F64 v, int64_t n) {
  if (n >= kLanes) return write(to, read<F64>(to) + v);
  for (int64_t i = 0; i < n; ++i) to[i] += v[i];
}

// e^x = 2^n * (1 + p), n whole, |r| = |x - n ln 2| <= ln 2 / 2, p = e^r - 1 by its Taylor series to r^7.
struct ExpParts {
  F32 two_n, p;
};
FASTMTL_INLINE ExpParts exp_parts(F32 x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, kept in the low bits
  const F32 shifted = x * 1.44269504f + kMagic;
  const F32 n = shifted - kMagic;
  F32 r = x - n * 0.693145752f;  // ln 2 in two parts
  r = r - n * 1.42860677e-6f;
  F32 p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
  const I32 exponent = ((I32)shifted - 0x4B400000 + 127) << 23;  // 0x4B400000: the bits of kMagic
  return {(F32)exponent, p};
}

// NaN stays NaN; below -87 the result is 0, above 88 it is e^88.
FASTMTL_INLINE F32 exp(F32 x) {
  x = select(x > 88.0f, splat(88.0f), x);
  const ExpParts e = exp_parts(select(x < -87.0f, splat(-87.0f), x));
  return select(x < -87.0f, F32{}, e.two_n * e.p + e.two_n);
}

// ln x for x >= 0, by x = 2^k m with m about one: with s = f / (2 + f), f = m - 1, ln m = 2 artanh s, by its Taylor
// series to s^11. ln 0 is -infinity; NaN stays NaN.
FASTMTL_INLINE F32 log(F32 x) {
  const I32 subnormal = x < 1.17549435e-38f;
  const F32 scaled = select(subnormal, x * 8388608.0f, x);
  // 0x3F3504F3: the bits of sqrt(1/2), from which m runs to sqrt(2)
  const I32 offset = (I32)scaled - 0x3F3504F3;
  const F32 k = convert<F32>(offset >> 23) - select(subnormal, splat(23.0f), F32{});
  const F32 f = (F32)((offset & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  const F32 s = f / (2.0f + f), s2 = s * s;
  F32 r = splat(2.0f / 11);
  r = r * s2 + 2.0f / 9;
  r = r * s2 + 2.0f / 7;
  r = r * s2 + 2.0f / 5;
  r = r * s2 + 2.0f / 3;
  const F32 half = 0.5f * f * f;
  const F32 value = k * 0.693145752f + (f - (half - (s * (half + r * s2) + k * 1.42860677e-6f)));
  return select(x > 0.0f, value, select(x == 0.0f, splat(-__builtin_inff()), x));
}

// ln(1 - p) for 0 <= p <= 1: what rounding 1 - p has lost is added again.
FASTMTL_INLINE F32 log1p_of_negative(F32 p) {
  const F32 u = 1.0f - p;
  const F32 lost = (1.0f - u) - p;
  const F32 value = log(u);
  return select(u > 0.0f, value + lost / u, value);
}

FASTMTL_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

// 1 - 2 / (e^2|x| + 1), and near zero, where that loses its digits, an odd polynomial fitted at Chebyshev nodes.
FASTMTL_INLINE F32 tanh(F32 x) {
  const F32 a = select(x < 0.0f, -x, x);
  const F32 far = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  const F32 s = x * x;
  F32 q = splat(-0.006276389118283987f);
  q = q * s + 0.021116215735673904f;
  q = q * s - 0.053875137120485306f;
  q = q * s + 0.13332924246788025f;
  q = q * s - 0.3333333134651184f;
  const F32 near = q * s * x + x;
  return select(a < 0.6f, near, select(x < 0.0f, -far, far));
}

// The normal distribution's cumulative function: the tail is e^(-x^2/2) times a polynomial in 1 / (1 + |x| / sqrt 8),
// fitted to erfcx at Chebyshev nodes.
FASTMTL_INLINE F32 normal_cdf(F32 x) {
  const F32 a = select(x < 0.0f, -x, x);
  const F32 t = 1.0f / (1.0f + a * 0.353553391f);
  F32 q = splat(-0.056475888937711716f);
  q = q * t + 0.2720835506916046f;
  q = q * t - 0.4616696238517761f;
  q = q * t + 0.2492346316576004f;
  q = q * t - 0.0070052193477749825f;
  q = q * t + 0.19447337090969086f;
  q = q * t + 0.24516348540782928f;
  q = q * t + 0.2820930778980255f;
  q = q * t + 0.2821025550365448f;
  const F32 tail = 0.5f * t * q * exp(-0.5f * a * a);
  return select(x < 0.0f, tail, 1.0f - tail);
}

}  // namespace fastmtl::FASTMTL_ISA
