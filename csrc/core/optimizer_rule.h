// A step of torch.optim's rules on a few numbers in registers, one operation after the other.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction.
#pragma once

#include "core/optimizer.h"
#include "core/optimizer_lanes.h"

namespace fastmtl::FASTMTL_ISA {

// One step's numbers, with the quotients that all rows share.
struct StepNumbers : Step {
  float inverse;  // 1 / root
  explicit StepNumbers(const Step& step) : Step(step), inverse(1.0f / step.root) {}
};

template <Rule R>
constexpr int kStates = R == kSgd                   ? 0
                        : R == kAdam || R == kAdamW ? 2
                                                    : 1;

#define FASTMTL_EACH _Pragma("GCC unroll 8") for (int u = 0; u < N; ++u)

// N vectors of weights, with the states that the rule has.
template <Rule R, int N>
struct Numbers {
  Lanes p[N], first[N], second[N];

  void load(const float* p_at, const float* first_at, const float* second_at) {
    FASTMTL_EACH p[u] = Lanes::load(p_at + u * Lanes::kCount);
    if constexpr (kStates<R> > 0) FASTMTL_EACH first[u] = Lanes::load(first_at + u * Lanes::kCount);
    if constexpr (kStates<R> > 1) FASTMTL_EACH second[u] = Lanes::load(second_at + u * Lanes::kCount);
  }
  // The first n of them.
  void store(float* p_at, float* first_at, float* second_at, int n = N) const {
    FASTMTL_EACH {
      if (u >= n) return;
      p[u].store(p_at + u * Lanes::kCount);
      if constexpr (kStates<R> > 0) first[u].store(first_at + u * Lanes::kCount);
      if constexpr (kStates<R> > 1) second[u].store(second_at + u * Lanes::kCount);
    }
  }

  // A step; `g` are the gradients with their L2 terms. It is one long chain of operations: all N go on together.
  [[gnu::always_inline]] void take(const StepNumbers& s, Lanes (&g)[N]) {
    const Lanes neg_lr = s.neg_lr;
    if constexpr (R == kSgd) {
      FASTMTL_EACH p[u] = fma(g[u], neg_lr, p[u]);
    } else if constexpr (R == kMomentum || R == kNesterov) {
      FASTMTL_EACH first[u] = fma(g[u], s.fresh, first[u] * s.keep);
      FASTMTL_EACH g[u] = R == kNesterov ? fma(first[u], s.ahead, g[u]) : first[u];
      FASTMTL_EACH p[u] = fma(g[u], neg_lr, p[u]);
    } else if constexpr (R == kAdagrad) {
      FASTMTL_EACH first[u] = fma(g[u], g[u], first[u]);
      FASTMTL_EACH p[u] = p[u] + neg_lr * g[u] / (sqrt(first[u]) + s.eps);
    } else {
      Lanes b[N];
      if constexpr (R == kAdamW) FASTMTL_EACH p[u] = p[u] * s.shrink;
      FASTMTL_EACH second[u] = second[u] * s.keep;
      FASTMTL_EACH b[u] = s.fresh_square * g[u];
      FASTMTL_EACH second[u] = fma(b[u], g[u], second[u]);
      FASTMTL_EACH b[u] = sqrt(second[u]);
      FASTMTL_EACH g[u] = g[u] - first[u];
      FASTMTL_EACH first[u] = fma(s.fresh, g[u], first[u]);
      FASTMTL_EACH b[u] = divide(b[u], s.root, s.inverse) + s.eps;
      FASTMTL_EACH p[u] = p[u] + neg_lr * first[u] / b[u];
    }
  }
};
#undef FASTMTL_EACH

// A step of a vector in memory.
template <Rule R>
void update(const StepNumbers& s, Lanes grad, float* p_at, float* first_at, float* second_at) {
  Numbers<R, 1> x;
  x.load(p_at, first_at, second_at);
  Lanes g[1] = {fma(x.p[0], s.l2, grad)};
  x.take(s, g);
  x.store(p_at, first_at, second_at);
}

}  // namespace fastmtl::FASTMTL_ISA
