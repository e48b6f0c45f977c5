// The optimizers' rules for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/optimizer.h"
#include "core/optimizer_closed.h"
#include "core/optimizer_lanes.h"
#include "core/optimizer_quick.h"
#include "core/optimizer_rows.h"
#include "core/optimizer_rowwise.h"

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

// Rows on their way through steps: copies that lie together.
class Tile {
 public:
  static constexpr int64_t kFloats = 512;  // of each array: all of them fit into the L1 cache
  static constexpr int64_t kMost = 128;    // rows

  explicit Tile(int64_t dim)
      : dim(dim),
        padded((dim + Lanes::kCount - 1) / Lanes::kCount * Lanes::kCount),
        capacity(std::clamp<int64_t>(kFloats / padded, 1, kMost)),
        memory_(static_cast<size_t>(kArrays * stride() + kLine), 0.0f) {
    void* at = memory_.data();
    size_t space = memory_.size() * sizeof(float);
    p = static_cast<float*>(std::align(kLine * sizeof(float), sizeof(float), at, space));
    first = p + stride();
    second = first + stride();
    grad = second + stride();
    least = grad + stride();
  }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;

  const int64_t dim;
  const int64_t padded;  // a row's floats here: whole lanes, so that rows may differ in their steps
  const int64_t capacity;
  float *p, *first, *second, *grad;
  float* least;  // what the quick steps collect

  static void copy(const float* from, float* to, int64_t n) {
    if (n == 16) {  // the usual width, as one instruction
      std::memcpy(to, from, 16 * sizeof(float));
    } else {
      std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
    }
  }
  void gather(const Table& t, int64_t row, int64_t i) {
    copy(t.p + row * dim, &p[i * padded], dim);
    if (t.first) copy(t.first + row * dim, &first[i * padded], dim);
    if (t.second) copy(t.second + row * dim, &second[i * padded], dim);
    for (int64_t d = i * padded + dim; d < (i + 1) * padded; ++d) p[d] = first[d] = second[d] = 1.0f;
  }
  void scatter(const Table& t, int64_t row, int64_t i, int64_t step) const {
    copy(&p[i * padded], t.p + row * dim, dim);
    if (t.first) copy(&first[i * padded], t.first + row * dim, dim);
    if (t.second) copy(&second[i * padded], t.second + row * dim, dim);
    t.last[row] = static_cast<int32_t>(step);
  }

 private:
  static constexpr int64_t kArrays = 5, kLine = 16;
  std::vector<float> memory_;

  // Whole lines, or every access takes two; and some more, or a load from one array waits for stores to another whose
  // address has the same low 12 bits.
  int64_t stride() const { return (capacity * padded + kLine - 1) / kLine * kLine + 13 * kLine; }
};

// The rows that a tile takes next, those that missed most first.
struct Pick {
  std::array<int64_t, Tile::kMost> rows, lags;
  int64_t n = 0;

  void add(int64_t row, int64_t lag) {
    rows[n] = row;
    lags[n++] = lag;
  }

  // By counting, where none missed very many.
  void sort() {
    constexpr int64_t kLags = 64;
    std::array<int64_t, kLags + 1> starts{};
    const std::array<int64_t, Tile::kMost> before = rows, lag = lags;
    if (*std::max_element(lags.begin(), lags.begin() + n) >= kLags) {
      std::array<int64_t, Tile::kMost> order;
      for (int64_t i = 0; i < n; ++i) order[i] = i;
      std::stable_sort(order.begin(), order.begin() + n, [&](int64_t a, int64_t b) { return lag[a] > lag[b]; });
      for (int64_t i = 0; i < n; ++i) {
        rows[i] = before[order[i]];
        lags[i] = lag[order[i]];
      }
      return;
    }
    for (int64_t i = 0; i < n; ++i) ++starts[kLags - lag[i]];
    for (int64_t k = 0, at = 0; k <= kLags; ++k) at += std::exchange(starts[k], at);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = starts[kLags - lag[i]]++;
      rows[to] = before[i];
      lags[to] = lag[i];
    }
  }
};

// Walks through rows (without a list: begin .. end - 1) and picks those that are not current.
class Picker {
 public:
  Picker(const Table& table, const History& history, const int64_t* rows, int64_t begin, int64_t end, int64_t upto)
      : table_(table), history_(history), rows_(rows), at_(begin), end_(end), upto_(upto) {}

  // Up to `capacity` rows; false: one of them lags behind the history.
  bool next(Pick& pick, int64_t capacity) {
    constexpr int64_t kAhead = 64;  // a row's step is one number in a line of its own
    pick.n = 0;
    for (; at_ < end_ && pick.n < capacity; ++at_) {
      if (rows_ && at_ + kAhead < end_) __builtin_prefetch(table_.last + rows_[at_ + kAhead], 1);
      const int64_t row = rows_ ? rows_[at_] : at_, last = table_.last[row];
      if (last >= upto_) continue;
      if (last + 1 < history_.begin) return false;
      pick.add(row, upto_ - last);
    }
    return true;
  }

 private:
  const Table& table_;
  const History& history_;
  const int64_t* rows_;
  int64_t at_, end_, upto_;
};

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

// Brings picked rows up to step `upto`.
template <Rule R>
class Replay {
 public:
  Replay(const Table& table, const History& history, int64_t upto)
      : table_(table), history_(history), upto_(upto), tile_(table.dim) {
    float most_lr = 0.0f;
    for (int64_t step = history.begin; step <= upto; ++step) {
      const Step& s = history.steps[step - history.begin];
      is_steady_ &= s.l2 == history.steps->l2 && s.fresh == history.steps->fresh;
      most_l2_ = std::max(most_l2_, std::fabs(s.l2));
      most_lr = std::max(most_lr, std::fabs(s.neg_lr));
      may_fade_ &= s.eps > 0.0f && s.keep >= 0.0f && s.keep <= 1.0f && s.fresh >= 0.0f && s.fresh <= 1.0f;
      if constexpr (kQuickRule) is_quick_ &= quick_.emplace_back(s).is_ordinary();
    }
    may_fade_ &= most_lr <= 0x1p40f && most_l2_ <= 1.0f;
    faded_ = 0x1.fffep-100f / std::max(most_lr, 0x1p-40f) * 0x1p-27f;  // 2^-127 itself is taken for zero here
  }

  int64_t capacity() const { return tile_.capacity; }

  // Takes the missed steps of a pick; meanwhile the rows of the pick after it are fetched.
  void run(Pick& pick, const Pick& after) {
    pick.sort();
    small_.n = 0;
    int64_t n = 0, steps = 0;
    for (int64_t i = 0; i < pick.n; ++i) {
      const int64_t row = pick.rows[i], lag = pick.lags[i];
      if (pass_quietly<R>(table_, history_, most_l2_ != 0.0f, row, upto_)) continue;
      if (is_quick_ && has_small(row)) {
        if (has_faded(row)) {
          fade(row, lag, n);
        } else {
          small_.add(row, lag);
        }
        continue;
      }
      pick.rows[n] = row;
      pick.lags[n] = lag;
      tile_.gather(table_, row, n++);
      steps += lag;
    }
    if (is_quick_) std::fill_n(tile_.least, (n * tile_.padded + QuickAdam::kGroup - 1) / 4, FLT_MAX);
    int64_t active = 0, taken = 0, fetched = 0;
    for (int64_t lag = n > 0 ? pick.lags[0] : 0; lag > 0; --lag) {
      while (active < n && pick.lags[active] >= lag) ++active;
      // as many rows are fetched as there is work to hide it behind
      taken += active;
      for (const int64_t due = after.n * taken / steps; fetched < due; ++fetched) prefetch(table_, after.rows[fetched]);
      step(upto_ + 1 - lag, active);
    }
    for (; fetched < after.n; ++fetched) prefetch(table_, after.rows[fetched]);
    if (is_quick_) check(pick, n);
    for (int64_t i = 0; i < n; ++i) {
      if (pick.rows[i] >= 0) tile_.scatter(table_, pick.rows[i], i, upto_);
    }
    if (small_.n > 0) run_small();
  }

 private:
  static constexpr bool kQuickRule = kHasQuick && (R == kAdam || R == kAdamW);

  // Whether the quick steps would not be exact for a row, or soon not.
  bool has_small(int64_t row) const {
    const float* p = table_.p + row * table_.dim;
    bool found = false;
    for (int64_t d = 0; d < table_.dim; ++d) found |= !(std::fabs(p[d]) >= 0x1p-56f);
    return found;
  }

  // Whether a row, as those without gradients do under weight decay after some hundred steps, has become so small that
  // lr * m is taken for zero in every step to come: its weights stay, v fades, and m goes on towards l2 * p.
  bool has_faded(int64_t row) const {
    if (R != kAdam || !may_fade_) return false;
    const float *p = table_.p + row * table_.dim, *m = table_.first + row * table_.dim;
    const float* v = table_.second + row * table_.dim;
    bool all = true;
    for (int64_t d = 0; d < table_.dim; ++d) {
      all &= std::fabs(m[d]) < faded_ && std::fabs(p[d]) * most_l2_ < faded_ && v[d] >= 0.0f && v[d] <= FLT_MAX;
      // 0 is added to each: -0 would not stay, and what is no normal number neither
      all &= std::fabs(p[d]) >= FLT_MIN || std::bit_cast<uint32_t>(p[d]) == 0;
    }
    return all;
  }

  // The missed steps of such a row, by way of the tile's row i.
  void fade(int64_t row, int64_t lag, int64_t i) {
    tile_.gather(table_, row, i);
    const Step* const steps = history_.steps + (upto_ + 1 - lag - history_.begin);
    for (int64_t k = i * tile_.padded; k < (i + 1) * tile_.padded; k += Lanes::kCount) {
      const Lanes p = Lanes::load(tile_.p + k);
      Lanes m = Lanes::load(tile_.first + k), v = Lanes::load(tile_.second + k);
      for (int64_t j = 0; j < lag; ++j) {
        const Lanes next = fma(steps[j].fresh, p * steps[j].l2 - m, m);
        const bool is_still = is_steady_ && all_equal(next, m);
        m = next;
        if (is_still) break;
      }
      for (int64_t j = 0; j < lag; ++j) v = v * steps[j].keep;
      m.store(tile_.first + k);
      v.store(tile_.second + k);
    }
    tile_.scatter(table_, row, i, upto_);
  }

  // The missed steps of rows that are no longer ordinary but not faded, by the processor's own quotients.
  void run_small() {
    const bool was_quick = std::exchange(is_quick_, false);
    small_.sort();
    for (int64_t i = 0; i < small_.n; ++i) tile_.gather(table_, small_.rows[i], i);
    int64_t active = 0;
    for (int64_t lag = small_.lags[0]; lag > 0; --lag) {
      while (active < small_.n && small_.lags[active] >= lag) ++active;
      step(upto_ + 1 - lag, active);
    }
    for (int64_t i = 0; i < small_.n; ++i) tile_.scatter(table_, small_.rows[i], i, upto_);
    is_quick_ = was_quick;
  }

  // One step of the tile's first n rows.
  void step(int64_t number, int64_t n) {
    const int64_t end = n * tile_.padded;
    float *p = tile_.p, *first = tile_.first, *second = tile_.second;
    if constexpr (kQuickRule) {
      if (is_quick_) {
        const QuickStep& s = quick_[static_cast<size_t>(number - history_.begin)];
        return QuickAdam::step<R == kAdamW>(s, p, first, second, tile_.least, end);
      }
    }
    const Spread s(history_.steps[number - history_.begin]);
    for (int64_t i = 0; i < end; i += Lanes::kCount) {
      update<R>(s, Lanes::load(p + i) * s.l2, p + i, first + i, second + i);
    }
  }

  // Finds rows for which the quick steps may not be exact: they are taken again.
  void check(Pick& pick, int64_t n) {
    const int64_t end = n * tile_.padded;
    for (int64_t from = 0; from < end; from += QuickAdam::kGroup) {
      const int64_t to = std::min(from + QuickAdam::kGroup, end);
      if (QuickAdam::is_exact(tile_.p + from, tile_.second + from, tile_.least + from / 4, to - from)) continue;
      for (int64_t i = from / tile_.padded; i * tile_.padded < to; ++i) {
        if (pick.rows[i] < 0) continue;
        small_.add(pick.rows[i], pick.lags[i]);
        pick.rows[i] = -1;
      }
    }
  }

  const Table& table_;
  const History& history_;
  const int64_t upto_;
  Tile tile_;
  Pick small_;
  float most_l2_ = 0.0f, faded_ = 0.0f;
  bool may_fade_ = true, is_steady_ = true, is_quick_ = kQuickRule;
  std::vector<QuickStep> quick_;
};

template <Rule R>
bool replay_rule(const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end,
                 int64_t upto) {
  const FlushTiny guard;
  Replay<R> replay(t, history, upto);
  Picker picker(t, history, rows, begin, end, upto);
  Pick picks[2];
  if (!picker.next(picks[0], replay.capacity())) return false;
  for (int64_t i = 0; i < picks[0].n; ++i) prefetch(t, picks[0].rows[i]);
  for (int turn = 0; picks[turn].n > 0; turn ^= 1) {
    if (!picker.next(picks[turn ^ 1], replay.capacity())) return false;
    replay.run(picks[turn], picks[turn ^ 1]);
  }
  return true;
}

template <Rule R>
void apply_rule(const Table& t, const Step& step, int64_t number, const int64_t* rows, const float* grads,
                int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 32;
  const FlushTiny guard;
  Tile tile(t.dim);
  const Spread s(step);
  for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) prefetch(t, rows[i]);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      prefetch(t, rows[i + kAhead]);
      __builtin_prefetch(t.last + rows[i + kAhead], 1);
    }
    if (tile.padded == t.dim) {  // whole lanes: where they lie
      const int64_t at = rows[i] * t.dim;
      for (int64_t k = 0; k < t.dim; k += Lanes::kCount) {
        const Lanes g = fma(Lanes::load(t.p + at + k), s.l2, Lanes::load(grads + i * t.dim + k));
        update<R>(s, g, t.p + at + k, t.first + at + k, t.second + at + k);
      }
      t.last[rows[i]] = static_cast<int32_t>(number);
      continue;
    }
    tile.gather(t, rows[i], 0);
    Tile::copy(grads + i * t.dim, tile.grad, t.dim);
    for (int64_t k = 0; k < tile.padded; k += Lanes::kCount) {
      const Lanes g = fma(Lanes::load(&tile.p[k]), s.l2, Lanes::load(&tile.grad[k]));
      update<R>(s, g, &tile.p[k], &tile.first[k], &tile.second[k]);
    }
    tile.scatter(t, rows[i], 0, number);
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
    case kRowwiseAdagrad:
      return rowwise_replay(t, history, rows, begin, end, upto);
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
    case kRowwiseAdagrad:
      return rowwise_apply(t, step, number, rows, grads, begin, end);
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
  static const OptimizerKernels table = {replay, apply, dense, close_rows};
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
