// Sixteen numbers as one value: F32, F64, I32, U32, H16 (16 bits). Arithmetic, comparisons and shifts are operators,
// with a single number on either side too; a comparison gives an I32, which `select` takes.
//
// They are vectors of a register's size side by side, not one vector of the compiler's: of one wider than the registers
// gcc computes comparisons number by number, and keeps the rest in memory.
//
// Included only by sources that are compiled once for each instruction set, with FASTMTL_ISA naming the namespace, so
// that code for a newer processor is never taken for the older one's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define FASTMTL_INLINE [[gnu::always_inline]] inline

namespace fastmtl::FASTMTL_ISA {

constexpr int64_t kLanes = 16;

// Bytes of a register.
#if defined(__AVX512F__)
constexpr size_t kRegister = 64;
#elif defined(__AVX2__)
constexpr size_t kRegister = 32;
#else
constexpr size_t kRegister = 16;
#endif

// f(0), f(1), .. as compile-time numbers: in a loop that is unrolled late, gcc would keep the parts in memory.
template <int kCount, class F>
FASTMTL_INLINE void unrolled(const F& f) {
  [&]<int... kParts>(std::integer_sequence<int, kParts...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, kParts>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// The compiler's vector of so many numbers.
template <class E, size_t kCount>
struct Parts {
  typedef E Vector __attribute__((vector_size(kCount * sizeof(E))));
};

template <class E>
class Sixteen {
 public:
  static constexpr size_t kBytes = 16 * sizeof(E) < kRegister ? 16 * sizeof(E) : kRegister;  // of a part
  static constexpr int kParts = 16 * sizeof(E) / kBytes;
  using Part = typename Parts<E, kBytes / sizeof(E)>::Vector;
  Part part[kParts];

  Sixteen() = default;
  FASTMTL_INLINE Sixteen(E value) {
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { part[p] = Part{} + value; });
  }
  // The same bits.
  template <class Other>
  FASTMTL_INLINE explicit operator Sixteen<Other>() const {
    static_assert(sizeof(Other) == sizeof(E));
    Sixteen<Other> v;
    unrolled<kParts>([&](auto p)
                         __attribute__((always_inline)) { v.part[p] = (typename Sixteen<Other>::Part)part[p]; });
    return v;
  }

  FASTMTL_INLINE E& operator[](int64_t i) { return reinterpret_cast<E*>(part)[i]; }
  FASTMTL_INLINE E operator[](int64_t i) const { return reinterpret_cast<const E*>(part)[i]; }

#define FASTMTL_OPERATOR(op, with)                                                            \
  FASTMTL_INLINE Sixteen& operator with(Sixteen b) {                                          \
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { part[p] with b.part[p]; }); \
    return *this;                                                                             \
  }                                                                                           \
  FASTMTL_INLINE friend Sixteen operator op(Sixteen a, Sixteen b) { return a with b; }
  FASTMTL_OPERATOR(+, +=)
  FASTMTL_OPERATOR(-, -=)
  FASTMTL_OPERATOR(*, *=)
  FASTMTL_OPERATOR(/, /=)
  FASTMTL_OPERATOR(&, &=)
  FASTMTL_OPERATOR(|, |=)
  FASTMTL_OPERATOR(^, ^=)
#undef FASTMTL_OPERATOR
  FASTMTL_INLINE Sixteen operator-() const {
    Sixteen v;
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { v.part[p] = -part[p]; });
    return v;
  }
  FASTMTL_INLINE Sixteen operator<<(int bits) const {
    Sixteen v;
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { v.part[p] = part[p] << bits; });
    return v;
  }
  FASTMTL_INLINE Sixteen operator>>(int bits) const {
    Sixteen v;
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { v.part[p] = part[p] >> bits; });
    return v;
  }

#define FASTMTL_COMPARISON(op)                                                                               \
  FASTMTL_INLINE friend Sixteen<int32_t> operator op(Sixteen a, Sixteen b) {                                 \
    Sixteen<int32_t> mask;                                                                                   \
    unrolled<kParts>([&](auto p) __attribute__((always_inline)) { mask.part[p] = a.part[p] op b.part[p]; }); \
    return mask;                                                                                             \
  }
  FASTMTL_COMPARISON(<)
  FASTMTL_COMPARISON(<=)
  FASTMTL_COMPARISON(>)
  FASTMTL_COMPARISON(==)
#undef FASTMTL_COMPARISON
};

using F32 = Sixteen<float>;
using I32 = Sixteen<int32_t>;
using U32 = Sixteen<uint32_t>;
using F64 = Sixteen<double>;
using H16 = Sixteen<uint16_t>;

// Each number as the other type holds it.
template <class To, class E>
FASTMTL_INLINE To convert(Sixteen<E> v) {
  using T = std::remove_reference_t<decltype(To{}[0])>;
  constexpr size_t kTogether = kRegister / (sizeof(E) > sizeof(T) ? sizeof(E) : sizeof(T));
  using Source = typename Parts<E, kTogether>::Vector;
  using Target = typename Parts<T, kTogether>::Vector;
  To to;
  unrolled<16 / kTogether>([&](auto i) __attribute__((always_inline)) {
    constexpr size_t kFrom = i * sizeof(Source), kTo = i * sizeof(Target);
    Source source;
    constexpr size_t kBytes = Sixteen<E>::kBytes, kToBytes = To::kBytes;
    std::memcpy(&source, reinterpret_cast<const char*>(&v.part[kFrom / kBytes]) + kFrom % kBytes, sizeof(source));
    const Target target = __builtin_convertvector(source, Target);
    std::memcpy(reinterpret_cast<char*>(&to.part[kTo / kToBytes]) + kTo % kToBytes, &target, sizeof(target));
  });
  return to;
}

#if defined(__AVX512F__)
// By name where two halves become one register, which gcc would join in memory. (The masks are full, see
// packed_gemm_pack.h.)
template <>
FASTMTL_INLINE F32 convert<F32>(F64 v) {
  const __m256 low = _mm512_maskz_cvtpd_ps(0xFF, v.part[0]), high = _mm512_maskz_cvtpd_ps(0xFF, v.part[1]);
  F32 to;
  to.part[0] = _mm512_maskz_insertf32x8(0xFFFF, _mm512_castps256_ps512(low), high, 1);
  return to;
}
#elif defined(__AVX2__)
template <>
FASTMTL_INLINE F32 convert<F32>(F64 v) {
  F32 to;
  to.part[0] = _mm256_set_m128(_mm256_cvtpd_ps(v.part[1]), _mm256_cvtpd_ps(v.part[0]));
  to.part[1] = _mm256_set_m128(_mm256_cvtpd_ps(v.part[3]), _mm256_cvtpd_ps(v.part[2]));
  return to;
}
#endif

// a where the mask is set, else b.
template <class E>
FASTMTL_INLINE Sixteen<E> select(I32 mask, Sixteen<E> a, Sixteen<E> b) {
  unrolled<I32::kParts>([&](auto p)
                            __attribute__((always_inline)) { a.part[p] = mask.part[p] ? a.part[p] : b.part[p]; });
  return a;
}

// From memory and to it, wherever it lies.
template <class V>
FASTMTL_INLINE V read(const void* from) {
  V v;
  unrolled<V::kParts>([&](auto p) __attribute__((always_inline)) {
    std::memcpy(&v.part[p], static_cast<const char*>(from) + p * V::kBytes, V::kBytes);
  });
  return v;
}
template <class V>
FASTMTL_INLINE void write(void* to, V v) {
  unrolled<V::kParts>([&](auto p) __attribute__((always_inline)) {
    std::memcpy(static_cast<char*>(to) + p * V::kBytes, &v.part[p], V::kBytes);
  });
}

// Halves onto halves, always in the same order: the same sum on every instruction set.
template <int kCount>
FASTMTL_INLINE float sum_of(const typename Parts<float, kCount>::Vector& v) {
  if constexpr (kCount == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    typename Parts<float, kCount / 2>::Vector halves[2];
    std::memcpy(&halves, &v, sizeof(v));
    return sum_of<kCount / 2>(halves[0] + halves[1]);
  }
}

FASTMTL_INLINE float sum(F32 v) {
  if constexpr (F32::kParts == 4) {
    v.part[0] += v.part[2];
    v.part[1] += v.part[3];
  }
  if constexpr (F32::kParts > 1) v.part[0] += v.part[1];
  return sum_of<F32::kBytes / sizeof(float)>(v.part[0]);
}

FASTMTL_INLINE F32 splat(float value) { return F32{} + value; }

}  // namespace fastmtl::FASTMTL_ISA
