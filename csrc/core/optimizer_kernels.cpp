// The optimizers' rules for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/optimizer.h"
#include "core/optimizer_closed.h"
#include "core/optimizer_lanes.h"
#include "core/optimizer_replay.h"
#include "core/optimizer_rows.h"
#include "core/optimizer_rowwise.h"
#include "core/optimizer_rule.h"

namespace fastmtl::FASTMTL_ISA {
namespace {

template <Rule R>
void apply_rule(const Table& t, const Step& step, int64_t number, const int64_t* rows, const float* grads,
                int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 32;
  const FlushTiny guard;
  Tile tile(t.dim);
  std::vector<float> grad(static_cast<size_t>(tile.padded));
  const StepNumbers s(step);
  for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) prefetch(t, rows[i]);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      prefetch(t, rows[i + kAhead]);
      __builtin_prefetch(t.last + rows[i + kAhead], 1);
    }
    if (tile.padded == t.dim) {  // whole lanes: where they lie
      const int64_t at = rows[i] * t.dim;
      for (int64_t k = 0; k < t.dim; k += Lanes::kCount) {
        update<R>(s, Lanes::load(grads + i * t.dim + k), t.p + at + k, t.first + at + k, t.second + at + k);
      }
      t.last[rows[i]] = static_cast<int32_t>(number);
      continue;
    }
    tile.gather(t, rows[i], 0);
    Tile::copy(grads + i * t.dim, grad.data(), t.dim);
    for (int64_t k = 0; k < tile.padded; k += Lanes::kCount) {
      update<R>(s, Lanes::load(&grad[k]), &tile.p[k], &tile.first[k], &tile.second[k]);
    }
    tile.scatter(t, rows[i], 0, number);
  }
}

template <Rule R>
void dense_rule(const Step& step, float* p, const float* grad, float* first, float* second, int64_t n) {
  const FlushTiny guard;
  const StepNumbers s(step);
  int64_t i = 0;
  for (; i + Lanes::kCount <= n; i += Lanes::kCount) {
    update<R>(s, Lanes::load(grad + i), p + i, first + i, second + i);
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
  update<R>(s, Lanes::load(rest[3]), rest[0], rest[1], rest[2]);
  copy([&](float* array, float* lanes) { std::memcpy(array + i, lanes, bytes); });
}

template <bool kQuickly>
bool replay(int64_t rule, const Table& t, const History& history, const int64_t* rows, int64_t begin, int64_t end,
            int64_t upto) {
  switch (rule) {
    case kSgd:
      return replay_rule<kSgd>(t, history, rows, begin, end, upto, kQuickly);
    case kMomentum:
      return replay_rule<kMomentum>(t, history, rows, begin, end, upto, kQuickly);
    case kNesterov:
      return replay_rule<kNesterov>(t, history, rows, begin, end, upto, kQuickly);
    case kRowwiseAdagrad:
      return rowwise_replay(t, history, rows, begin, end, upto);
    case kAdam:
      return replay_rule<kAdam>(t, history, rows, begin, end, upto, kQuickly);
    case kAdamW:
      return replay_rule<kAdamW>(t, history, rows, begin, end, upto, kQuickly);
    default:
      return replay_rule<kAdagrad>(t, history, rows, begin, end, upto, kQuickly);
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

const OptimizerKernels& optimizer_kernels(bool slow_divider) {
  static const OptimizerKernels quick = {replay<true>, apply, dense, close_rows};
  static const OptimizerKernels plain = {replay<false>, apply, dense, close_rows};
  return slow_divider ? quick : plain;
}

}  // namespace fastmtl::FASTMTL_ISA
