// Rows brought up to date by the sums of core/optimizer_waiting.h: a few operations a row, however long it waited.
//
// Included only by a source that is compiled once for each instruction set, with FASTMTL_ISA naming the namespace and
// without contraction.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/optimizer_lanes.h"
#include "core/optimizer_rows.h"
#include "core/optimizer_waiting.h"

namespace fastmtl::FASTMTL_ISA {

// All that rows of one step have in common.
struct Closed {
  int64_t step = -1;
  float first, second, change;  // m and v are multiplied by, and the weight grows by a share of
  float sum, mean, c2, c3;      // W and what q_k are about
  float dense;                  // for smaller v the terms are added one by one

  // For rows that are current at `step`.
  Closed() = default;
  Closed(const Waits& all, int64_t step) : step(step) {
    constexpr double kTolerance = 1e-7;
    const Wait &from = all.waits[step - all.begin], &to = all.waits[all.n - 1];
    const double shrunk = to.log_weight - from.log_weight;
    first = static_cast<float>(std::exp(to.log_first - from.log_first));
    second = static_cast<float>(std::exp(to.log_second - from.log_second));
    change = static_cast<float>(std::expm1(shrunk));
    sum = static_cast<float>(from.sums[0] * std::exp(shrunk));
    mean = 1.0f;
    c2 = c3 = dense = 0.0f;
    if (from.sums[0] == 0.0) return;  // no step had a learning rate
    const double q = from.sums[1] / from.sums[0];
    double raw[5], scale = from.sums[0];
    for (int i = 0; i < 5; ++i, scale *= q) raw[i] = from.sums[i] / scale;  // moments of q_k / q
    const double m2 = raw[2] - 1, m3 = raw[3] - 3 * raw[2] + 2, m4 = raw[4] - 4 * raw[3] + 6 * raw[2] - 3;
    mean = static_cast<float>(q);
    c2 = static_cast<float>(m2);
    c3 = static_cast<float>(m3);
    if (m4 > kTolerance) {
      const double least = q * (std::sqrt(std::sqrt(m4 / kTolerance)) - 1);
      dense = static_cast<float>(least * least);
    }
  }
};

// Makes rows current, one after the other.
class Closer {
 public:
  Closer(const Table& table, const Waits& all) : table_(table), all_(all), upto_(all.begin + all.n - 1) {}

  void close(int64_t row) {
    const int64_t step = table_.last[row];
    Closed& c = known_[static_cast<size_t>(step) % known_.size()];
    if (c.step != step) c = Closed(all_, step);
    float *p = table_.p + row * table_.dim, *m = table_.first + row * table_.dim, *v = table_.second + row * table_.dim;
    table_.last[row] = static_cast<int32_t>(upto_);
    if (all_zero(m, table_.dim)) {  // most rows of most tables
      if (!all_zero(v, table_.dim)) scale(v, c.second);
      if (c.change != 0.0f) {
        for (int64_t d = 0; d < table_.dim; ++d) p[d] += p[d] * c.change;
      }
      return;
    }
    const bool one_by_one = has_smaller(v, c.dense);
    if (one_by_one) list_terms(step);
    int64_t d = 0;
    for (; d + Lanes::kCount <= table_.dim; d += Lanes::kCount) move(c, one_by_one, p + d, m + d, v + d);
    if (d == table_.dim) return;
    const size_t bytes = sizeof(float) * static_cast<size_t>(table_.dim - d);
    float rest[3][Lanes::kCount] = {};
    std::memcpy(rest[0], p + d, bytes);
    std::memcpy(rest[1], m + d, bytes);
    std::memcpy(rest[2], v + d, bytes);
    move(c, one_by_one, rest[0], rest[1], rest[2]);
    std::memcpy(p + d, rest[0], bytes);
    std::memcpy(m + d, rest[1], bytes);
    std::memcpy(v + d, rest[2], bytes);
  }

 private:
  struct Term {
    float w, q;
  };

  bool has_smaller(const float* v, float bound) const {
    bool found = false;
    for (int64_t d = 0; d < table_.dim; ++d) found |= v[d] < bound;
    return found;
  }

  void scale(float* x, float by) const {
    for (int64_t d = 0; d < table_.dim; ++d) x[d] *= by;
  }

  void list_terms(int64_t step) {
    if (listed_ == step) return;
    listed_ = step;
    terms_.clear();
    const int64_t from = step - all_.begin;
    const double shrunk = std::exp(all_.waits[all_.n - 1].log_weight - all_.waits[from].log_weight);
    double term = 1.0, level = 1.0;
    for (int64_t k = from + 1; k < all_.n && term >= kLeastTerm; ++k) {
      const Wait& wait = all_.waits[k];
      term *= wait.fade;
      level *= wait.swell;
      terms_.push_back({static_cast<float>(wait.a * term * shrunk), static_cast<float>(wait.e * level)});
    }
  }

  void move(const Closed& c, bool one_by_one, float* p_at, float* m_at, float* v_at) const {
    const Lanes p = Lanes::load(p_at), m = Lanes::load(m_at), v = Lanes::load(v_at);
    const Lanes r = sqrt(v);
    Lanes by = 0.0f;
    if (one_by_one) {
      // the small ones first
      for (auto term = terms_.rbegin(); term != terms_.rend(); ++term) by = by + Lanes(term->w) / (r + term->q);
      by = by * m;
    } else {
      const Lanes inverse = Lanes(1.0f) / (r + c.mean), y = inverse * c.mean;
      by = c.sum * m * inverse * fma(y * y, Lanes(c.c2) - c.c3 * y, 1.0f);
    }
    (p + fma(p, c.change, by)).store(p_at);
    (m * c.first).store(m_at);
    (v * c.second).store(v_at);
  }

  const Table& table_;
  const Waits& all_;
  const int64_t upto_;
  std::array<Closed, 256> known_;
  std::vector<Term> terms_;
  int64_t listed_ = -1;
};

// See OptimizerKernels::close.
inline bool close_rows(const Table& t, const Waits& all, const int64_t* rows, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 24, kFar = 64;
  const FlushTiny guard;
  const int64_t upto = all.begin + all.n - 1;
  Closer closer(t, all);
  for (int64_t i = begin; i < end; ++i) {
    if (rows && i + kFar < end) __builtin_prefetch(t.last + rows[i + kFar], 1);
    if (i + kAhead < end) {
      const int64_t ahead = rows ? rows[i + kAhead] : i + kAhead;
      if (t.last[ahead] < upto) prefetch(t, ahead);
    }
    const int64_t row = rows ? rows[i] : i;
    if (t.last[row] >= upto) continue;
    if (t.last[row] < all.begin) return false;
    closer.close(row);
  }
  return true;
}

}  // namespace fastmtl::FASTMTL_ISA
