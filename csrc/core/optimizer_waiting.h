// What rows of a table owe to the steps they waited through under Adam and AdamW without coupled decay, in closed form.
//
// Without a gradient a step k multiplies m by 1 - fresh_k, v by keep_k and the weight by shrink_k, and adds to it
// a_k m_k / (sqrt(v_k) + e_k), a_k = neg_lr_k root_k, e_k = eps_k root_k. For a row that is current at step s all of
// them together are
//   m_s * sum over k > s of w_k / (sqrt(v_s) + q_k),   w_k = a_k * product of (1 - fresh) / (sqrt(keep) * shrink),
//                                                      q_k = e_k / sqrt(product of keep),
// times the product of all shrink, products over s + 1 .. k. The terms fade by 0.9 and more a step: of each step s only
// some 200 sums are ever added to. Where the q_k lie close together around their mean q (weighted by w), the sum is
//   W / (r + q) * (1 + c2 y^2 - c3 y^3 + c4 y^4 ...),   r = sqrt(v_s), y = q / (r + q) <= 1, c_i the central moments
//                                                       of q_k / q,
// of which the kernel takes the terms up to c3 where c4 y^4 is small, and adds one by one where it is not: in early
// steps, where the q_k grow quickly, for v of eps^2 or less.
//
// Layout      waits[i] belongs to step begin + i; waits[0] to the step at which every row was current.
// Arithmetic  double here: a row may have waited for thousands of steps.
// Source      the update rules are those of Adam (Kingma and Ba, ICLR'15) and AdamW (Loshchilov and Hutter, ICLR'19).
#pragma once

#include <cmath>
#include <cstdint>

#include "core/optimizer.h"

namespace fastmtl {

// Terms below this are left out: 2^-24 would be a rounding of the largest one.
constexpr double kLeastTerm = 0x1p-32;

struct Wait {
  double log_first, log_second, log_weight;  // of what the steps up to this one multiply m, v and the weight by
  double a, e, fade, swell;                  // this step's: a_k, e_k, and the factors by which w_k and q_k go on
  double term, level;  // of a row that is current at this step: w_k / a_k and q_k / e_k at the newest k
  double sums[5];      // and the sums of w_k q_k^i so far, i = 0 .. 4
};
constexpr int64_t kWaitFields = sizeof(Wait) / sizeof(double);

struct Waits {
  const Wait* waits;
  int64_t begin, n;
};

// Where every row is current.
inline Wait wait_from_here() { return {0, 0, 0, 0, 0, 1, 1, 1, 1, {}}; }

// Writes waits[n], the step after waits[n - 1], and adds its term to the sums of the steps before. `front`, which is
// returned anew, is the first step whose terms have not faded.
inline int64_t wait_a_step(Wait* waits, int64_t n, int64_t front, const Step& step) {
  const Wait& before = waits[n - 1];
  Wait now = wait_from_here();
  const double first = 1.0 - step.fresh, second = step.keep, weight = step.shrink;
  now.log_first = before.log_first + std::log(first);
  now.log_second = before.log_second + std::log(second);
  now.log_weight = before.log_weight + std::log(weight);
  now.swell = 1.0 / std::sqrt(second);
  now.fade = first * now.swell / weight;
  now.a = static_cast<double>(step.neg_lr) * step.root;
  now.e = static_cast<double>(step.eps) * step.root;
  for (int64_t i = front; i < n; ++i) {
    Wait& wait = waits[i];
    wait.term *= now.fade;
    wait.level *= now.swell;
    const double q = now.e * wait.level;
    double add = now.a * wait.term;
    for (double& sum : wait.sums) {
      sum += add;
      add *= q;
    }
  }
  waits[n] = now;
  while (front < n && waits[front].term < kLeastTerm) ++front;
  return front;
}

}  // namespace fastmtl
