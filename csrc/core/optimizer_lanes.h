// The few operations of the optimizers' rules on as many floats as one instruction takes, each correctly rounded, so
// that every instruction set computes the same bits.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction: which products are fused is part of the result.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastmtl::FASTMTL_ISA {

#if defined(__AVX512F__)

struct Lanes {
  static constexpr int64_t kCount = 16;
  __m512 v;
  Lanes() = default;
  Lanes(__m512 x) : v(x) {}
  Lanes(float x) : v(_mm512_set1_ps(x)) {}
  static Lanes load(const float* from) { return _mm512_loadu_ps(from); }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
};
inline Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// the form with a mask: gcc 12 warns of the undefined operand of the other
inline Lanes sqrt(Lanes a) { return _mm512_maskz_sqrt_ps(0xffff, a.v); }
inline bool all_equal(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) == 0xffff; }
inline Lanes at_most(float most, Lanes a) { return _mm512_maskz_min_ps(0xffff, Lanes(most).v, a.v); }

#elif defined(__AVX2__) && defined(__FMA__)

struct Lanes {
  static constexpr int64_t kCount = 8;
  __m256 v;
  Lanes() = default;
  Lanes(__m256 x) : v(x) {}
  Lanes(float x) : v(_mm256_set1_ps(x)) {}
  static Lanes load(const float* from) { return _mm256_loadu_ps(from); }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
};
inline Lanes operator+(Lanes a, Lanes b) { return _mm256_add_ps(a.v, b.v); }
inline Lanes operator-(Lanes a, Lanes b) { return _mm256_sub_ps(a.v, b.v); }
inline Lanes operator*(Lanes a, Lanes b) { return _mm256_mul_ps(a.v, b.v); }
inline Lanes operator/(Lanes a, Lanes b) { return _mm256_div_ps(a.v, b.v); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Lanes sqrt(Lanes a) { return _mm256_sqrt_ps(a.v); }
inline bool all_equal(Lanes a, Lanes b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) == 0xff; }
inline Lanes at_most(float most, Lanes a) { return _mm256_min_ps(Lanes(most).v, a.v); }

#else

struct Lanes {
  static constexpr int64_t kCount = 1;
  float v;
  Lanes() = default;
  Lanes(float x) : v(x) {}
  static Lanes load(const float* from) { return *from; }
  void store(float* to) const { *to = v; }
};
inline Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
inline Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
inline Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
inline Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return __builtin_fmaf(a.v, b.v, c.v); }
inline Lanes sqrt(Lanes a) { return __builtin_sqrtf(a.v); }
inline bool all_equal(Lanes a, Lanes b) { return a.v == b.v; }
inline Lanes at_most(float most, Lanes a) { return a.v > most ? most : a.v; }

#endif

// Vectors that go through a chain of operations together: as many as hide its length. (On AVX2 half of them are in the
// nearest cache meanwhile, which costs less than waiting for the chain.)
constexpr int kMostVectors = Lanes::kCount >= 8 ? 8 : 4;

// a / b where inverse is 1 / b rounded: one correction makes the quotient exact (Markstein, IBM J. R&D 34, 1990), and
// the divider, which the square roots and the other quotient keep busy, is spared. The bound lets infinity stay
// infinity (and NaN, which at_most lets pass, NaN).
inline Lanes divide(Lanes a, Lanes b, Lanes inverse) {
  const Lanes q = at_most(FLT_MAX, a * inverse);
  return fma(fma(Lanes(0.0f) - b, q, a), inverse, q);
}

// Takes numbers below the normal ones for zero while it lives, on the thread that made it.
class FlushTiny {
 public:
#ifdef __SSE2__
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushTiny() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | kFlushToZero);
  }
  ~FlushTiny() { set(before_); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;  // results and operands
  // "memory": what is loaded afterwards is computed with afterwards
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
  uint64_t before_;
#else
  FlushTiny() {}  // by hand, or a guard that does nothing is warned of as unused
#endif
  FlushTiny(const FlushTiny&) = delete;
  FlushTiny& operator=(const FlushTiny&) = delete;
};

}  // namespace fastmtl::FASTMTL_ISA
