// Steps of Adam without a gradient, as many as an Intel processor with AVX-512 can take: the bits of Numbers::take in
// optimizer_rule.h, without the divider.
//
// A square root and a quotient of 16 floats occupy the divider for 12 and 10 cycles (measured, Sapphire Rapids), in
// which 44 other operations could run; a step needs 15 of them. Here the quotient is 7 multiplications and an
// approximate reciprocal. On a Zen 4, which divides twice as fast and multiplies half as fast, it would not pay: see
// slow_divider in csrc/cpu/optimizer.cpp.
//
// The quotient a / b is correctly rounded: two Newton steps make of the processor's approximation, good to 2^-14, the
// rounded 1 / b; with it one correction by the exact remainder rounds as a division would (Markstein, IBM J. R&D 34,
// 1990). The first Newton step rounds upwards, because 1 / b lies so little above the middle between two floats where
// b's fraction is all ones that the second one would miss it; so 1 / b was found to be rounded correctly for each of
// the 2^23 fractions, and with approximations off by up to 2^-15 at random too. All that fails where a remainder is too
// small to be a normal number. So a is 2^64 times too large, and its quotient is taken back in the addition to the
// weight, which rounds once. What is left is too small to move a weight of 2^-60 or more. Steps that leave a weight
// smaller than that, or not finite, are found afterwards and taken again by division, from the numbers in the table.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/optimizer.h"
#include "core/optimizer_lanes.h"
#include "core/optimizer_rule.h"

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
  static constexpr int kVectors = 4;

  // Takes a step without a gradient; `least` collects the smallest sizes of the weights.
#define FASTMTL_EACH _Pragma("GCC unroll 8") for (int u = 0; u < N; ++u)
  template <Rule R, int N>
  [[gnu::always_inline]] static void take(const QuickStep& s, Numbers<R, N>& x, Lanes& least) {
    const Lanes one = 1.0f, near = 0x1p-64f;
    auto &p = x.p, &m = x.first, &v = x.second;
    Lanes g[N], b[N], q[N], r[N], e[N];
    FASTMTL_EACH g[u] = p[u] * s.l2;
    if constexpr (R == kAdamW) FASTMTL_EACH p[u] = p[u] * s.shrink;
    FASTMTL_EACH v[u] = v[u] * s.keep;
    FASTMTL_EACH b[u] = s.fresh_square * g[u];
    FASTMTL_EACH v[u] = fma(b[u], g[u], v[u]);
    FASTMTL_EACH b[u] = sqrt(v[u]);
    FASTMTL_EACH g[u] = g[u] - m[u];
    FASTMTL_EACH m[u] = fma(s.fresh, g[u], m[u]);
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
    FASTMTL_EACH least = _mm512_maskz_range_ps(0xffff, least.v, p[u].v, 2);  // the smaller of the sizes
  }
#undef FASTMTL_EACH

  // Whether numbers, after some steps, are those that division would have given.
  template <Rule R, int N>
  static bool is_exact(const Numbers<R, N>& x, Lanes least) {
    const __m512 most = _mm512_set1_ps(FLT_MAX);
    __mmask16 good = _mm512_cmp_ps_mask(least.v, _mm512_set1_ps(0x1p-60f), _CMP_GE_OQ);
    for (int u = 0; u < N; ++u) {
      good &= _mm512_cmp_ps_mask(_mm512_abs_ps(x.p[u].v), most, _CMP_LE_OQ);
      good &= _mm512_cmp_ps_mask(x.second[u].v, most, _CMP_LE_OQ);
    }
    return good == 0xffff;
  }

 private:
  static Lanes above(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a.v, b.v, c.v); }     // a * b - c
  static Lanes beneath(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b

  // a * b + c, rounded upwards
  static Lanes upward(Lanes a, Lanes b, Lanes c) {
    return _mm512_fmadd_round_ps(a.v, b.v, c.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }
};

#else

// Without AVX-512 no step is quick.
constexpr bool kHasQuick = false;

struct QuickStep {
  explicit QuickStep(const Step&) {}
  bool is_ordinary() const { return false; }
};

struct QuickAdam {
  static constexpr int kVectors = 1;
  template <Rule R, int N>
  static void take(const QuickStep&, Numbers<R, N>&, Lanes&) {}
  template <Rule R, int N>
  static bool is_exact(const Numbers<R, N>&, Lanes) {
    return false;
  }
};

#endif

}  // namespace fastmtl::FASTMTL_ISA
