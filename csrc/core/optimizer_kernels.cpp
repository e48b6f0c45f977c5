// The optimizers' rules for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "core/optimizer.h"
#include "core/optimizer_lanes.h"

namespace fastmtl::FASTMTL_ISA {
namespace {

// A Step, spread over lanes.
struct Spread {
  Lanes l2, shrink, keep, fresh, fresh_square, ahead, root, inverse, eps, neg_lr;
  explicit Spread(const Step& s)
      : l2(s.l2),
        shrink(s.shrink),
        keep(s.keep),
        fresh(s.fresh),
        fresh_square(s.fresh_square),
        ahead(s.ahead),
        root(s.root),
        inverse(1.0f / s.root),
        eps(s.eps),
        neg_lr(s.neg_lr) {}
};

// One step of a few numbers; `g` is the gradient with its L2 term.
template <Rule R>
void update(const Spread& s, Lanes g, float* p_at, float* first_at, float* second_at) {
  Lanes p = Lanes::load(p_at);
  if constexpr (R == kSgd) {
    p = fma(g, s.neg_lr, p);
  } else if constexpr (R == kMomentum || R == kNesterov) {
    const Lanes first = fma(g, s.fresh, Lanes::load(first_at) * s.keep);
    first.store(first_at);
    p = fma(R == kNesterov ? fma(first, s.ahead, g) : first, s.neg_lr, p);
  } else if constexpr (R == kAdagrad) {
    const Lanes first = fma(g, g, Lanes::load(first_at));
    first.store(first_at);
    p = p + s.neg_lr * g / (sqrt(first) + s.eps);
  } else {
    if constexpr (R == kAdamW) p = p * s.shrink;
    const Lanes before = Lanes::load(first_at);
    const Lanes first = fma(s.fresh, g - before, before);
    const Lanes second = fma(s.fresh_square * g, g, Lanes::load(second_at) * s.keep);
    first.store(first_at);
    second.store(second_at);
    p = p + s.neg_lr * first / (divide(sqrt(second), s.root, s.inverse) + s.eps);
  }
  p.store(p_at);
}

// Rows on their way through missed steps: copies that lie together, those that missed most first.
struct Tile {
  static constexpr int64_t kFloats = 512;  // of each array: all fit into the L1 cache
  static constexpr int64_t kMost = 128;    // rows

  explicit Tile(int64_t dim)
      : dim(dim),
        padded((dim + Lanes::kCount - 1) / Lanes::kCount * Lanes::kCount),
        capacity(std::clamp<int64_t>(kFloats / padded, 1, kMost)),
        p(static_cast<size_t>(capacity * padded), 0.0f),
        first(p.size(), 0.0f),
        second(p.size(), 0.0f),
        grad(p.size(), 0.0f) {}

  const int64_t dim;
  const int64_t padded;  // a row's floats here: whole lanes, so that rows may differ in their steps
  const int64_t capacity;
  std::vector<float> p, first, second, grad;
  std::array<int64_t, kMost> rows, lags;
  int64_t n = 0;

  static void copy(const float* from, float* to, int64_t n) {
    if (n == 16) {  // the usual width, as one instruction
      std::memcpy(to, from, 16 * sizeof(float));
    } else {
      std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
    }
  }
  // Those that missed most first; by counting, where none missed very many.
  void sort(const int32_t* last, int64_t upto) {
    constexpr int64_t kLags = 64;
    std::array<int64_t, kLags + 1> starts{};
    int64_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      lags[i] = upto - last[rows[i]];
      most = std::max(most, lags[i]);
    }
    if (most >= kLags) {
      std::sort(rows.begin(), rows.begin() + n, [&](int64_t a, int64_t b) { return last[a] < last[b]; });
      return;
    }
    for (int64_t i = 0; i < n; ++i) ++starts[kLags - lags[i]];
    for (int64_t k = 0, at = 0; k <= kLags; ++k) at += std::exchange(starts[k], at);
    const std::array<int64_t, kMost> before = rows;
    for (int64_t i = 0; i < n; ++i) rows[starts[kLags - lags[i]]++] = before[i];
  }
  void gather(const Table& t) {
    for (int64_t i = 0; i < n; ++i) {
      copy(t.p + rows[i] * dim, &p[i * padded], dim);
      if (t.first) copy(t.first + rows[i] * dim, &first[i * padded], dim);
      if (t.second) copy(t.second + rows[i] * dim, &second[i * padded], dim);
    }
  }
  void scatter(const Table& t, int64_t step) {
    for (int64_t i = 0; i < n; ++i) {
      copy(&p[i * padded], t.p + rows[i] * dim, dim);
      if (t.first) copy(&first[i * padded], t.first + rows[i] * dim, dim);
      if (t.second) copy(&second[i * padded], t.second + rows[i] * dim, dim);
      t.last[rows[i]] = static_cast<int32_t>(step);
    }
  }
};

// Rows of a list lie anywhere: they are asked for this many rows ahead.
constexpr int64_t kAhead = 24;

void prefetch(const Table& t, int64_t row) {
  constexpr int64_t kLine = 64 / sizeof(float), kLines = 4;
  __builtin_prefetch(t.last + row, 1);
  for (int64_t d = 0; d < std::min(t.dim, kLines * kLine); d += kLine) {
    __builtin_prefetch(t.p + row * t.dim + d, 1);
    if (t.first) __builtin_prefetch(t.first + row * t.dim + d, 1);
    if (t.second) __builtin_prefetch(t.second + row * t.dim + d, 1);
  }
}

bool all_zero(const float* x, int64_t n) {
  bool zero = n == 0 || x[0] == 0.0f;  // mostly that settles it
  if (!zero) return false;
  for (int64_t d = 0; d < n; ++d) zero &= x[d] == 0.0f;
  return zero;
}

// A row that no step moves: no gradient, no L2 term, no memory of gradients. Only an average fades, or weights shrink.
template <Rule R>
bool pass_quietly(const Table& t, const History& history, bool any_l2, int64_t row, int64_t upto) {
  constexpr bool kAdamLike = R == kAdam || R == kAdamW;
  constexpr bool kRemembers = kAdamLike || R == kMomentum || R == kNesterov;
  float* p = t.p + row * t.dim;
  if (any_l2 && !all_zero(p, t.dim)) return false;
  if (kRemembers && !all_zero(t.first + row * t.dim, t.dim)) return false;
  if constexpr (kAdamLike) {
    float* second = t.second + row * t.dim;
    const bool fades = !all_zero(second, t.dim), shrinks = R == kAdamW && !all_zero(p, t.dim);
    for (int64_t step = t.last[row] + 1; step <= upto && (fades || shrinks); ++step) {
      const Step& s = history.steps[step - history.begin];
      for (int64_t d = 0; d < t.dim && fades; ++d) second[d] *= s.keep;
      for (int64_t d = 0; d < t.dim && shrinks; ++d) p[d] *= s.shrink;
    }
  }
  t.last[row] = static_cast<int32_t>(upto);
  return true;
}

template <Rule R>
void replay_tile(Tile& tile, const Table& t, const History& history, int64_t upto) {
  if (tile.n == 0) return;
  tile.sort(t.last, upto);
  tile.gather(t);
  int64_t active = 0;
  for (int64_t step = t.last[tile.rows[0]] + 1; step <= upto; ++step) {
    while (active < tile.n && t.last[tile.rows[active]] < step) ++active;
    const Spread s(history.steps[step - history.begin]);
    const int64_t n = active * tile.padded;
    float *p = tile.p.data(), *first = tile.first.data(), *second = tile.second.data();
    for (int64_t i = 0; i < n; i += Lanes::kCount) {
      update<R>(s, Lanes::load(p + i) * s.l2, p + i, first + i, second + i);
    }
  }
  tile.scatter(t, upto);
  tile.n = 0;
}

template <Rule R>
bool replay_rule(const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end,
                 int64_t upto) {
  const FlushTiny guard;
  Tile tile(t.dim);
  bool any_l2 = false;
  for (int64_t i = 0; i < history.end - history.begin; ++i) any_l2 |= history.steps[i].l2 != 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows ? rows[i] : i;
    if (rows && i + kAhead < end) prefetch(t, rows[i + kAhead]);
    if (t.last[row] >= upto) continue;
    if (t.last[row] + 1 < history.begin) return false;
    if (pass_quietly<R>(t, history, any_l2, row, upto)) continue;
    tile.rows[tile.n++] = row;
    if (tile.n == tile.capacity) replay_tile<R>(tile, t, history, upto);
  }
  replay_tile<R>(tile, t, history, upto);
  return true;
}

template <Rule R>
void apply_rule(const Table& t, const Step& step, int64_t number, const int64_t* rows, const float* grads,
                int64_t begin, int64_t end) {
  const FlushTiny guard;
  Tile tile(t.dim);
  const Spread s(step);
  for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) prefetch(t, rows[i]);
  for (int64_t i = begin; i < end; i += tile.capacity) {
    tile.n = std::min(tile.capacity, end - i);
    for (int64_t k = 0; k < tile.n; ++k) {
      tile.rows[k] = rows[i + k];
      if (i + k + kAhead < end) prefetch(t, rows[i + k + kAhead]);
      Tile::copy(grads + (i + k) * t.dim, &tile.grad[k * tile.padded], t.dim);
    }
    tile.gather(t);
    for (int64_t k = 0; k < tile.n * tile.padded; k += Lanes::kCount) {
      const Lanes g = fma(Lanes::load(&tile.p[k]), s.l2, Lanes::load(&tile.grad[k]));
      update<R>(s, g, &tile.p[k], &tile.first[k], &tile.second[k]);
    }
    tile.scatter(t, number);
  }
}

template <Rule R>
void dense_rule(const Step& step, float* p, const float* grad, float* first, float* second, int64_t n) {
  const FlushTiny guard;
  const Spread s(step);
  int64_t i = 0;
  for (; i + Lanes::kCount <= n; i += Lanes::kCount) {
    update<R>(s, fma(Lanes::load(p + i), s.l2, Lanes::load(grad + i)), p + i, first + i, second + i);
  }
  if (i == n) return;
  float rest[4][Lanes::kCount] = {};  // in lanes of their own: memory behind the arrays is not ours
  const auto copy = [&](auto&& one) {
    one(p, rest[0]);
    if constexpr (R != kSgd) one(first, rest[1]);
    if constexpr (R == kAdam || R == kAdamW) one(second, rest[2]);
  };
  const size_t bytes = sizeof(float) * static_cast<size_t>(n - i);
  copy([&](float* array, float* lanes) { std::memcpy(lanes, array + i, bytes); });
  std::memcpy(rest[3], grad + i, bytes);
  update<R>(s, fma(Lanes::load(rest[0]), s.l2, Lanes::load(rest[3])), rest[0], rest[1], rest[2]);
  copy([&](float* array, float* lanes) { std::memcpy(array + i, lanes, bytes); });
}

bool replay(int64_t rule, const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end,
            int64_t upto) {
  switch (rule) {
    case kSgd:
      return replay_rule<kSgd>(t, history, rows, begin, end, upto);
    case kMomentum:
      return replay_rule<kMomentum>(t, history, rows, begin, end, upto);
    case kNesterov:
      return replay_rule<kNesterov>(t, history, rows, begin, end, upto);
    case kAdam:
      return replay_rule<kAdam>(t, history, rows, begin, end, upto);
    case kAdamW:
      return replay_rule<kAdamW>(t, history, rows, begin, end, upto);
    default:
      return replay_rule<kAdagrad>(t, history, rows, begin, end, upto);
  }
}

void apply(int64_t rule, const Table& t, const Step& step, int64_t number, const int64_t* rows, const float* grads,
           int64_t begin, int64_t end) {
  switch (rule) {
    case kSgd:
      return apply_rule<kSgd>(t, step, number, rows, grads, begin, end);
    case kMomentum:
      return apply_rule<kMomentum>(t, step, number, rows, grads, begin, end);
    case kNesterov:
      return apply_rule<kNesterov>(t, step, number, rows, grads, begin, end);
    case kAdam:
      return apply_rule<kAdam>(t, step, number, rows, grads, begin, end);
    case kAdamW:
      return apply_rule<kAdamW>(t, step, number, rows, grads, begin, end);
    default:
      return apply_rule<kAdagrad>(t, step, number, rows, grads, begin, end);
  }
}

void dense(int64_t rule, const Step& step, float* p, const float* grad, float* first, float* second, int64_t n) {
  switch (rule) {
    case kSgd:
      return dense_rule<kSgd>(step, p, grad, first, second, n);
    case kMomentum:
      return dense_rule<kMomentum>(step, p, grad, first, second, n);
    case kNesterov:
      return dense_rule<kNesterov>(step, p, grad, first, second, n);
    case kAdam:
      return dense_rule<kAdam>(step, p, grad, first, second, n);
    case kAdamW:
      return dense_rule<kAdamW>(step, p, grad, first, second, n);
    default:
      return dense_rule<kAdagrad>(step, p, grad, first, second, n);
  }
}

}  // namespace

const OptimizerKernels& optimizer_kernels() {
  static const OptimizerKernels table = {replay, apply, dense};
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
