// Missed steps made up for, one after the other: rows are copied to lie together, a few at a time, and take their steps
// in registers.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/optimizer.h"
#include "core/optimizer_lanes.h"
#include "core/optimizer_quick.h"
#include "core/optimizer_rows.h"
#include "core/optimizer_rule.h"

namespace fastmtl::FASTMTL_ISA {

// Copies of rows that lie together.
class Tile {
 public:
  static constexpr int64_t kFloats = 2048;  // of each array: all of them fit into the L1 cache, or nearly
  static constexpr int64_t kMost = 128;     // rows

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
  }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;

  const int64_t dim;
  const int64_t padded;  // a row's floats here: whole lanes, so that rows may differ in their steps
  const int64_t capacity;
  float *p, *first, *second;

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
  // a group of vectors may begin in the last row and end behind it
  static constexpr int64_t kArrays = 3, kLine = 16, kBehind = kMostVectors * Lanes::kCount;
  std::vector<float> memory_;

  // Whole lines, or every access takes two; and some more, or a load from one array waits for stores to another whose
  // address has the same low 12 bits.
  int64_t stride() const { return (capacity * padded + kBehind + kLine - 1) / kLine * kLine + 13 * kLine; }
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

// The ways to take a step without a gradient, for as many vectors together as the registers hold with their states.
template <Rule R>
struct ByDivision {
  using Step = StepNumbers;
  static constexpr int kVectors = kMostVectors;
  [[gnu::always_inline]] static void take(const Step& s, Numbers<R, kVectors>& x, Lanes&) {
    Lanes g[kVectors];
    for (int u = 0; u < kVectors; ++u) g[u] = x.p[u] * s.l2;
    x.take(s, g);
  }
  static bool is_exact(const Numbers<R, kVectors>&, Lanes) { return true; }
};
template <Rule R>
struct Quickly {
  using Step = QuickStep;
  static constexpr int kVectors = QuickAdam::kVectors;
  [[gnu::always_inline]] static void take(const Step& s, Numbers<R, kVectors>& x, Lanes& least) {
    QuickAdam::take(s, x, least);
  }
  static bool is_exact(const Numbers<R, kVectors>& x, Lanes least) { return QuickAdam::is_exact(x, least); }
};

// Brings picked rows up to step `upto`; `quickly`: by multiplications, where the rule and the numbers allow it.
template <Rule R>
class Replay {
 public:
  Replay(const Table& table, const History& history, int64_t upto, bool quickly)
      : table_(table), history_(history), upto_(upto), tile_(table.dim), is_quick_(quickly && kQuickRule) {
    float most_lr = 0.0f;
    for (int64_t step = history.begin; step <= upto; ++step) {
      const Step& s = history.steps[step - history.begin];
      steps_.emplace_back(s);
      is_steady_ &= s.l2 == history.steps->l2 && s.fresh == history.steps->fresh;
      most_l2_ = std::max(most_l2_, std::fabs(s.l2));
      most_lr = std::max(most_lr, std::fabs(s.neg_lr));
      may_fade_ &= s.eps > 0.0f && s.keep >= 0.0f && s.keep <= 1.0f && s.fresh >= 0.0f && s.fresh <= 1.0f;
      if (is_quick_) is_quick_ = quick_.emplace_back(s).is_ordinary();
    }
    may_fade_ &= most_lr <= 0x1p40f && most_l2_ <= 1.0f;
    faded_ = 0x1.fffep-100f / std::max(most_lr, 0x1p-40f) * 0x1p-27f;  // 2^-127 itself is taken for zero here
  }

  int64_t capacity() const { return tile_.capacity; }

  // Takes the missed steps of a pick; meanwhile the rows of a later pick are fetched.
  void run(Pick& pick, const Pick& later) {
    pick.sort();
    small_.n = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < pick.n; ++i) {
      const int64_t row = pick.rows[i], lag = pick.lags[i];
      if (pass_quietly<R>(table_, history_, most_l2_ != 0.0f, row, upto_)) continue;
      if (kAdamLike && has_small(row)) {
        if (has_faded(row)) {
          fade(row, lag, n);
          continue;
        }
        if (is_quick_) {
          small_.add(row, lag);
          continue;
        }
      }
      pick.rows[n] = row;
      pick.lags[n] = lag;
      tile_.gather(table_, row, n++);
    }
    pick.n = n;
    if constexpr (kQuickRule) {
      if (is_quick_) {
        take_steps<Quickly<R>>(quick_, pick, later);
        if (small_.n == 0) return;
        // those for which the quick steps are not exact
        small_.sort();
        for (int64_t i = 0; i < small_.n; ++i) tile_.gather(table_, small_.rows[i], i);
        return take_steps<ByDivision<R>>(steps_, small_, Pick{});
      }
    }
    take_steps<ByDivision<R>>(steps_, pick, later);
  }

 private:
  static constexpr bool kAdamLike = R == kAdam || R == kAdamW;
  static constexpr bool kQuickRule = kHasQuick && kAdamLike;

  // Whether the quick steps would not be exact for a row, or soon not.
  bool has_small(int64_t row) const {
    const float* p = table_.p + row * table_.dim;
    // sizes compare as their bits do, which gcc does many at a time; NaN lies above infinity
    constexpr uint32_t kInfinity = 0x7F800000;
    uint32_t least = kInfinity, most = 0;
    for (int64_t d = 0; d < table_.dim; ++d) {
      const uint32_t size = std::bit_cast<uint32_t>(p[d]) & 0x7FFFFFFF;
      least = std::min(least, size);
      most = std::max(most, size);
    }
    return least < std::bit_cast<uint32_t>(0x1p-56f) || most > kInfinity;
  }

  // Whether a row, as those without gradients do under weight decay after some hundred steps, has become so small that
  // lr * m is taken for zero in every step to come: its weights stay, v fades, and m goes on towards l2 * p.
  bool has_faded(int64_t row) const {
    if (R != kAdam || !may_fade_) return false;
    const float *p = table_.p + row * table_.dim, *m = table_.first + row * table_.dim;
    const float* v = table_.second + row * table_.dim;
    int others = 0;
    for (int64_t d = 0; d < table_.dim; ++d) {
      others |= std::fabs(m[d]) < faded_ && std::fabs(p[d]) * most_l2_ < faded_ ? 0 : 1;
      others |= v[d] >= 0.0f && v[d] <= FLT_MAX ? 0 : 1;
      // 0 is added to each: -0 would not stay, and what is no normal number neither
      others |= std::fabs(p[d]) >= FLT_MIN || std::bit_cast<uint32_t>(p[d]) == 0 ? 0 : 1;
    }
    return others == 0;
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

  // The missed steps of the rows in the tile, and back to the table. Where the way was not exact for a row, it is a
  // small one, and nothing of it is kept.
  template <class Way>
  void take_steps(const std::vector<typename Way::Step>& steps, Pick& pick, const Pick& later) {
    const int64_t per_row = tile_.padded / Lanes::kCount, vectors = pick.n * per_row;
    int64_t fetched = 0;
    for (int64_t from = 0; from < vectors; from += Way::kVectors) {
      const int64_t to = std::min<int64_t>(from + Way::kVectors, vectors);
      if (!take_steps_together<Way>(steps, pick, from, per_row)) {
        for (int64_t i = from / per_row; i * per_row < to; ++i) {
          if (pick.rows[i] < 0) continue;
          small_.add(pick.rows[i], pick.lags[i]);
          pick.rows[i] = -1;
        }
      }
      // as many rows are fetched as there was work to hide it behind
      for (const int64_t due = later.n * to / vectors; fetched < due; ++fetched) prefetch(table_, later.rows[fetched]);
    }
    for (; fetched < later.n; ++fetched) prefetch(table_, later.rows[fetched]);
    for (int64_t i = 0; i < pick.n; ++i) {
      if (pick.rows[i] >= 0) tile_.scatter(table_, pick.rows[i], i, upto_);
    }
  }

  // Those of some neighbouring vectors. Rows are sorted by what they missed, so that these mostly missed the same.
  template <class Way>
  bool take_steps_together(const std::vector<typename Way::Step>& steps, const Pick& pick, int64_t from,
                           int64_t per_row) {
    constexpr int N = Way::kVectors;
    float* const p = tile_.p + from * Lanes::kCount;
    float* const first = tile_.first + from * Lanes::kCount;
    float* const second = tile_.second + from * Lanes::kCount;
    int64_t lags[N];
    for (int u = 0; u < N; ++u) {
      const int64_t row = (from + u) / per_row;
      lags[u] = row < pick.n ? pick.lags[row] : 0;
    }
    Numbers<R, N> x;
    Lanes least = FLT_MAX;
    x.load(p, first, second);
    const auto* step = steps.data() + (upto_ + 1 - lags[0] - history_.begin);
    int64_t lag = lags[0];
    for (int active = 0; lag > lags[N - 1]; --lag) {  // the first ones missed more than the last one
      while (lags[active] >= lag) ++active;
      Way::take(*step++, x, least);
      x.store(p, first, second, active);
      x.load(p, first, second);
    }
    for (; lag > 0; --lag) Way::take(*step++, x, least);
    x.store(p, first, second);
    return Way::is_exact(x, least);
  }

  const Table& table_;
  const History& history_;
  const int64_t upto_;
  Tile tile_;
  Pick small_;
  float most_l2_ = 0.0f, faded_ = 0.0f;
  bool may_fade_ = true, is_steady_ = true, is_quick_;
  std::vector<StepNumbers> steps_;
  std::vector<QuickStep> quick_;
};

// See OptimizerKernels::replay.
template <Rule R>
bool replay_rule(const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end, int64_t upto,
                 bool quickly) {
  constexpr int kPicks = 3;  // one at work, two on their way: a short one is through before the next has come
  const FlushTiny guard;
  Replay<R> replay(t, history, upto, quickly);
  Picker picker(t, history, rows, begin, end, upto);
  Pick picks[kPicks];
  for (int k = 0; k < kPicks - 1; ++k) {
    if (!picker.next(picks[k], replay.capacity())) return false;
    for (int64_t i = 0; i < picks[k].n; ++i) prefetch(t, picks[k].rows[i]);
  }
  for (int turn = 0; picks[turn].n > 0; turn = (turn + 1) % kPicks) {
    Pick& later = picks[(turn + kPicks - 1) % kPicks];
    if (!picker.next(later, replay.capacity())) return false;
    replay.run(picks[turn], later);
  }
  return true;
}

}  // namespace fastmtl::FASTMTL_ISA
