// Steps of Adam without a gradient, as many as a processor with AVX-512 can take: the bits of `update` in
// optimizer_kernels.cpp, without its divider.
//
// A square root and a quotient of 16 floats occupy the divider for 12 and 10 cycles (measured, Sapphire Rapids), in
// which 44 other operations could run; a step needs 15 of them. Here the quotient is 7 multiplications and an
// approximate reciprocal, and four vectors are computed in lockstep, because one step is a chain of some 90 cycles.
//
// The quotient a / b is correctly rounded: two Newton steps make of the processor's approximation, good to 2^-14, the
// rounded 1 / b; with it one correction by the exact remainder rounds as a division would (Markstein, IBM J. R&D 34,
// 1990). The first Newton step rounds upwards, because 1 / b lies so little above the middle between two floats where
// b's fraction is all ones that the second one would miss it; so 1 / b was found to be rounded correctly for each of
// the 2^23 fractions, and with approximations off by up to 2^-15 at random too. All that fails where a remainder is too
// small to be a normal number. So a is 2^64 times too large, and its quotient is taken back in the addition to the
// weight, which rounds once. What is left is too small to move a weight of 2^-60 or more. Steps that leave a weight
// smaller than that, or not finite, are found afterwards and taken again by `update`, from the numbers in the table.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/optimizer.h"
#include "core/optimizer_lanes.h"

namespace fastmtl::FASTMTL_ISA {

#if defined(__AVX512F__) && defined(__AVX512DQ__)

constexpr bool kHasQuick = true;

// A step's numbers, as the quick form wants them.
struct QuickStep {
  float l2, shrink, keep, fresh, fresh_square, root, inverse, eps, far_lr;

  explicit QuickStep(const Step& s)
      : l2(s.l2),
        shrink(s.shrink),
        keep(s.keep),
        fresh(s.fresh),
        fresh_square(s.fresh_square),
        root(s.root),
        inverse(1.0f / s.root),
        eps(s.eps),
        far_lr(s.neg_lr * 0x1p64f) {}

  // Whether no quotient can leave the normal numbers but by the sizes that are looked at afterwards.
  bool is_ordinary() const {
    return eps >= 0x1p-40f && eps <= 0x1p40f && root >= 0x1p-20f && root <= 1.0f && std::fabs(far_lr) <= 0x1p84f;
  }
};

struct QuickAdam {
  static constexpr int64_t kGroup = 4 * Lanes::kCount;  // numbers that are computed together

  // Takes a step for the first n numbers (whole lanes). `least` has Lanes::kCount numbers for each group, which collect
  // the smallest sizes of its weights.
  template <bool kDecoupled>
  static void step(const QuickStep& s, float* p, float* first, float* second, float* least, int64_t n) {
    const Spread spread(s);
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup, least += Lanes::kCount) {
      lockstep<kDecoupled, 4>(spread, p + i, first + i, second + i, least);
    }
    for (; i < n; i += Lanes::kCount) lockstep<kDecoupled, 1>(spread, p + i, first + i, second + i, least);
  }

  // Whether the numbers of a group, after some steps, are those that `update` would have computed.
  static bool is_exact(const float* p, const float* second, const float* least, int64_t n) {
    __mmask16 good = _mm512_cmp_ps_mask(_mm512_loadu_ps(least), _mm512_set1_ps(0x1p-60f), _CMP_GE_OQ);
    for (int64_t i = 0; i < n; i += Lanes::kCount) {
      const __m512 most = _mm512_set1_ps(FLT_MAX);
      good &= _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(p + i)), most, _CMP_LE_OQ);
      good &= _mm512_cmp_ps_mask(_mm512_loadu_ps(second + i), most, _CMP_LE_OQ);
    }
    return good == 0xffff;
  }

 private:
  struct Spread {
    Lanes l2, shrink, keep, fresh, fresh_square, root, inverse, eps, far_lr;
    explicit Spread(const QuickStep& s)
        : l2(s.l2),
          shrink(s.shrink),
          keep(s.keep),
          fresh(s.fresh),
          fresh_square(s.fresh_square),
          root(s.root),
          inverse(s.inverse),
          eps(s.eps),
          far_lr(s.far_lr) {}
  };

  static Lanes above(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a.v, b.v, c.v); }     // a * b - c
  static Lanes beneath(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b

  // a * b + c, rounded upwards
  static Lanes upward(Lanes a, Lanes b, Lanes c) {
    return _mm512_fmadd_round_ps(a.v, b.v, c.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }

#define FASTMTL_EACH _Pragma("GCC unroll 4") for (int u = 0; u < N; ++u)
  template <bool kDecoupled, int N>
  static void lockstep(const Spread& s, float* p_at, float* first_at, float* second_at, float* least_at) {
    constexpr int64_t kCount = Lanes::kCount;
    const Lanes one = 1.0f, near = 0x1p-64f;
    Lanes p[N], m[N], v[N], g[N], b[N], q[N], r[N], e[N];
    FASTMTL_EACH p[u] = Lanes::load(p_at + kCount * u);
    FASTMTL_EACH m[u] = Lanes::load(first_at + kCount * u);
    FASTMTL_EACH v[u] = Lanes::load(second_at + kCount * u);
    FASTMTL_EACH g[u] = p[u] * s.l2;
    if constexpr (kDecoupled) FASTMTL_EACH p[u] = p[u] * s.shrink;
    FASTMTL_EACH v[u] = v[u] * s.keep;
    FASTMTL_EACH b[u] = s.fresh_square * g[u];
    FASTMTL_EACH v[u] = fma(b[u], g[u], v[u]);
    FASTMTL_EACH b[u] = sqrt(v[u]);
    FASTMTL_EACH g[u] = g[u] - m[u];
    FASTMTL_EACH m[u] = fma(s.fresh, g[u], m[u]);
    FASTMTL_EACH m[u].store(first_at + kCount * u);
    FASTMTL_EACH v[u].store(second_at + kCount * u);
    FASTMTL_EACH q[u] = b[u] * s.inverse;  // sqrt(v) / root
    FASTMTL_EACH r[u] = above(s.root, q[u], b[u]);
    FASTMTL_EACH b[u] = beneath(r[u], s.inverse, q[u]);
    FASTMTL_EACH b[u] = b[u] + s.eps;
    FASTMTL_EACH r[u] = _mm512_maskz_rcp14_ps(0xffff, b[u].v);  // 1 / b
    FASTMTL_EACH g[u] = s.far_lr * m[u];
    FASTMTL_EACH e[u] = beneath(b[u], r[u], one);
    FASTMTL_EACH r[u] = upward(e[u], r[u], r[u]);
    FASTMTL_EACH e[u] = beneath(b[u], r[u], one);
    FASTMTL_EACH r[u] = fma(e[u], r[u], r[u]);
    FASTMTL_EACH q[u] = g[u] * r[u];  // 2^64 * lr * m / b
    FASTMTL_EACH e[u] = above(b[u], q[u], g[u]);
    FASTMTL_EACH q[u] = beneath(e[u], r[u], q[u]);
    FASTMTL_EACH p[u] = fma(q[u], near, p[u]);
    Lanes least = Lanes::load(least_at);
    FASTMTL_EACH p[u].store(p_at + kCount * u);
    FASTMTL_EACH least = _mm512_maskz_range_ps(0xffff, least.v, p[u].v, 2);  // the smaller of the sizes
    least.store(least_at);
  }
#undef FASTMTL_EACH
};

#else

// Without AVX-512 no step is quick.
constexpr bool kHasQuick = false;

struct QuickStep {
  explicit QuickStep(const Step&) {}
  bool is_ordinary() const { return false; }
};

struct QuickAdam {
  static constexpr int64_t kGroup = Lanes::kCount;
  template <bool kDecoupled>
  static void step(const QuickStep&, float*, float*, float*, float*, int64_t) {}
  static bool is_exact(const float*, const float*, const float*, int64_t) { return false; }
};

#endif

}  // namespace fastmtl::FASTMTL_ISA
