// torch.optim's updates: of embedding tables at sparse cost, with the numbers that dense gradients would give, and of
// all other parameters.
//
// A dense optimizer touches every row in every step. Here a row that no gradient reached waits: `last` says up to which
// step it is current. The steps it missed are made up later, all at once while the row is in registers or L1
// ("replay"), in the same order of operations, so that the result is the same, bit for bit, as if it had never waited.
//
// Layout      p, first and second are row-major [rows, dim]; last is [rows]. A step's numbers are one Step.
// Threading   none in here: the caller splits lists of unique rows, or ranges of rows.
// Arithmetic  fp32, in the order of torch's single-tensor implementation; fused multiply-adds where torch has them.
//             Square roots and quotients are correctly rounded (torch's sqrt on MKL is not, in 0.6% of all cases).
//             Numbers below 1.2e-38 are taken for zero: idle rows decay into that range, where processors crawl.
// Determinism a row's result depends on the row and its steps alone.
// Aliasing    the arrays must not overlap.
// Bounds      the caller checks rows against the table; a row that lags further than the history reaches is reported.
#pragma once

#include <cstdint>

namespace fastmtl {

// In the order of fastmtl.optim.rules.RULES.
enum Rule : int64_t { kSgd = 0, kMomentum, kNesterov, kAdam, kAdamW, kAdagrad, kRules };
// Behind torch's: of tables only.
constexpr int kRowwiseAdagrad = kRules;

// Numbers of state a rule keeps for each weight.
inline int64_t states_of(int64_t rule) { return rule == kSgd ? 0 : rule == kAdam || rule == kAdamW ? 2 : 1; }

// One optimizer step's numbers. What a rule does not name it does not read.
//   all        g = gradient + l2 * p
//   Sgd        p += neg_lr * g
//   Momentum   first = keep * first + fresh * g;  p += neg_lr * first
//   Nesterov   likewise;                          p += neg_lr * (g + ahead * first)
//   Adam       first += fresh * (g - first);  second = keep * second + fresh_square * g * g
//              p += neg_lr * first / (sqrt(second) / root + eps)
//   AdamW      p *= shrink, then Adam
//   Adagrad    first += g * g;  p += neg_lr * g / (sqrt(first) + eps)
//   row-wise   first += mean of g * g over the row;  likewise
struct Step {
  float l2, shrink, keep, fresh, fresh_square, ahead, root, eps, neg_lr;
};
constexpr int64_t kStepFields = sizeof(Step) / sizeof(float);

// steps[i] is step number begin + i.
struct History {
  const Step* steps;
  int64_t begin, end;
};

struct Table {
  float *p, *first, *second;  // null where the rule has no such state; first is [rows] for the row-wise rule
  int32_t* last;
  int64_t rows, dim;
};

struct Waits;  // core/optimizer_waiting.h

struct OptimizerKernels {
  // Brings rows[begin, end), or without a list the rows begin .. end - 1 themselves, to step `upto`, with gradients of
  // zero. False: a row lags behind the history.
  bool (*replay)(int64_t rule, const Table& table, const History& history, const int64_t* rows, int64_t begin,
                 int64_t end, int64_t upto);

  // Takes step `number` with the gradients [n, dim] of the current rows[begin, end); marks them.
  void (*apply)(int64_t rule, const Table& table, const Step& step, int64_t number, const int64_t* rows,
                const float* grads, int64_t begin, int64_t end);

  // Takes a step with the gradients of n neighbouring numbers, rows or not.
  void (*dense)(int64_t rule, const Step& step, float* p, const float* grad, float* first, float* second, int64_t n);

  // Brings rows, as for replay, to the newest of the steps that they wait for, by Adam's or AdamW's closed form: not to
  // the bits of a replay. False: a row waits for longer than that.
  bool (*close)(const Table& table, const Waits& waits, const int64_t* rows, int64_t begin, int64_t end);
};

// The kernels as built for one instruction set; where its divider is slow, those that do without it where they can.
namespace baseline {
const OptimizerKernels& optimizer_kernels(bool slow_divider);
}
namespace avx2 {
const OptimizerKernels& optimizer_kernels(bool slow_divider);
}
namespace avx512 {
const OptimizerKernels& optimizer_kernels(bool slow_divider);
}

}  // namespace fastmtl
