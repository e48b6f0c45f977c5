// The tables' optimizers on torch tensors: check, run. What a step means is in core/optimizer.h.
#include "core/optimizer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core/kernels.h"
#include "core/optimizer_waiting.h"
#include "cpu/ops.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kGrainRows = 512;   // rows a thread must have to be worth waking
constexpr int64_t kShareRows = 1024;  // that it takes at once

// Whether a quotient takes longer than the nine multiplications that give the same. A step of 16 numbers takes 13
// cycles by these on an Intel core (Sapphire Rapids), whose divider alone would need 22; on a Zen 4 6.8 ns, by
// division 4.7. FASTMTL_DIVIDER=slow or fast decides by hand.
bool has_slow_divider() {
  const char* asked = std::getenv("FASTMTL_DIVIDER");
  if (asked) return std::strcmp(asked, "slow") == 0;
#ifdef FASTMTL_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const OptimizerKernels& choose() {
  const bool slow = has_slow_divider();
#ifdef FASTMTL_X86
  const char* name = best_kernels().name;
  if (std::strcmp(name, "avx512") == 0) return avx512::optimizer_kernels(slow);
  if (std::strcmp(name, "avx2") == 0) return avx2::optimizer_kernels(slow);
#endif
  return baseline::optimizer_kernels(slow);
}

const OptimizerKernels& kernels() {
  static const OptimizerKernels& chosen = choose();
  return chosen;
}

Table checked_table(const Tensor& p, const std::vector<Tensor>& states, const Tensor& last, int64_t rule) {
  check_cpu(p, ScalarType::Float, 2, "table");
  check_cpu(last, ScalarType::Int, 1, "last");
  STD_TORCH_CHECK(p.size(1) >= 1, "a table must have at least one column");
  const bool row_wise = rule == kRowwiseAdagrad;
  STD_TORCH_CHECK(rule >= 0 && (rule < kRules || row_wise), "there is no rule ", rule);
  STD_TORCH_CHECK(static_cast<int64_t>(states.size()) == states_of(rule), "rule ", rule, " has ", states_of(rule),
                  " states, not ", states.size());
  STD_TORCH_CHECK(p.is_contiguous() && last.is_contiguous() && last.size(0) == p.size(0),
                  "last must have an entry for each row of the table");
  float* state[2] = {nullptr, nullptr};
  for (size_t i = 0; i < states.size(); ++i) {
    check_cpu(states[i], ScalarType::Float, row_wise ? 1 : 2, "state");
    STD_TORCH_CHECK(
        states[i].is_contiguous() && states[i].size(0) == p.size(0) && (row_wise || states[i].size(1) == p.size(1)),
        "a state must have the shape of its table, or where it is row-wise an entry for each row");
    state[i] = states[i].mutable_data_ptr<float>();
  }
  return {p.mutable_data_ptr<float>(), state[0], state[1], last.mutable_data_ptr<int32_t>(), p.size(0), p.size(1)};
}

// steps [n, kStepFields]: row i is step begin + i.
History checked_history(const Tensor& steps, int64_t begin) {
  check_cpu(steps, ScalarType::Float, 2, "steps");
  STD_TORCH_CHECK(steps.is_contiguous() && steps.size(1) == kStepFields, "steps must be [n, ", kStepFields, "]");
  // a row keeps its step in 32 bits
  STD_TORCH_CHECK(begin >= 0 && begin <= INT32_MAX - steps.size(0), "the steps ", begin, " and on are out of range");
  return {reinterpret_cast<const Step*>(steps.const_data_ptr<float>()), begin, begin + steps.size(0)};
}

Step step_of(const std::vector<double>& numbers) {
  STD_TORCH_CHECK(static_cast<int64_t>(numbers.size()) == kStepFields, "a step has ", kStepFields, " numbers");
  float fields[kStepFields];
  for (size_t k = 0; k < numbers.size(); ++k) fields[k] = static_cast<float>(numbers[k]);
  Step step;
  std::memcpy(&step, fields, sizeof(step));
  return step;
}

// Ascending and in the table: no two threads write the same row, and none writes elsewhere.
const int64_t* checked_rows(const Tensor& rows, int64_t height) {
  check_cpu(rows, ScalarType::Long, 1, "rows");
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  const int64_t* data = rows.const_data_ptr<int64_t>();
  const int64_t n = rows.size(0);
  bool ascending = true;
  for (int64_t i = 1; i < n; ++i) ascending &= data[i - 1] < data[i];
  STD_TORCH_CHECK(ascending && (n == 0 || (data[0] >= 0 && data[n - 1] < height)),
                  "rows must be ascending, unique and in the table");
  return data;
}

// Runs f(begin, end) -> bool on shares of the rows; all must say that the history reached far enough. A thread takes
// the next share when it is through with one: rows differ in the steps they missed, and processors in who else wants
// them.
template <class F>
void all_reached(int64_t begin, int64_t end, const F& f) {
  bool reached = true;  // only ever cleared, so that threads may race to do so
  int64_t next = begin;
  const int64_t most = (end - begin + kGrainRows - 1) / kGrainRows;
  const int64_t threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(1, most));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t from = __atomic_fetch_add(&next, kShareRows, __ATOMIC_RELAXED);
      if (from >= end) return;
      if (!f(from, std::min(from + kShareRows, end))) __atomic_store_n(&reached, false, __ATOMIC_RELAXED);
    }
  });
  STD_TORCH_CHECK(reached, "a row missed more steps than were kept");
}

// Brings the rows (without a list: begin .. end - 1) to step `upto`.
void table_replay(const Tensor& p, std::vector<Tensor> states, const Tensor& last, int64_t rule, const Tensor& steps,
                  int64_t first_step, std::optional<Tensor> rows, int64_t begin, int64_t end, int64_t upto) {
  const Table table = checked_table(p, states, last, rule);
  const History history = checked_history(steps, first_step);
  STD_TORCH_CHECK(upto < history.end, "the history ends before step ", upto);
  const int64_t* listed = rows ? checked_rows(*rows, table.rows) : nullptr;
  if (rows) {
    begin = 0;
    end = rows->size(0);
  }
  STD_TORCH_CHECK(begin >= 0 && begin <= end && (rows || end <= table.rows), "rows ", begin, " to ", end,
                  " are not in the table");
  all_reached(begin, end,
              [&](int64_t from, int64_t to) { return kernels().replay(rule, table, history, listed, from, to, upto); });
}

// The last step of `steps`, with the gradients [n, D] of the rows, which are first brought to the step before
// (`lazily`: are taken as they are); then begin .. end - 1 are brought to this step.
void table_step(const Tensor& p, std::vector<Tensor> states, const Tensor& last, int64_t rule, const Tensor& steps,
                int64_t first_step, const Tensor& rows, const Tensor& grads, bool lazily, int64_t begin, int64_t end) {
  const Table table = checked_table(p, states, last, rule);
  const History history = checked_history(steps, first_step);
  STD_TORCH_CHECK(history.end > history.begin, "there is no step to take");
  STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= table.rows, "rows ", begin, " to ", end,
                  " are not in the table");
  const int64_t* touched = checked_rows(rows, table.rows);
  check_cpu(grads, ScalarType::Float, 2, "grads");
  STD_TORCH_CHECK(grads.is_contiguous() && grads.size(0) == rows.size(0) && grads.size(1) == table.dim,
                  "grads must have a row for each of rows");
  const int64_t now = history.end - 1, n = rows.size(0);
  const float* values = grads.const_data_ptr<float>();
  const Step& step = history.steps[now - history.begin];
  all_reached(0, n, [&](int64_t from, int64_t to) {
    if (!lazily && !kernels().replay(rule, table, history, touched, from, to, now - 1)) return false;
    kernels().apply(rule, table, step, now, touched, values, from, to);
    return true;
  });
  all_reached(begin, end, [&](int64_t from, int64_t to) {
    return lazily || kernels().replay(rule, table, history, nullptr, from, to, now);
  });
}

void check_waits(const Tensor& waits, int64_t n) {
  check_cpu(waits, ScalarType::Double, 2, "waits");
  STD_TORCH_CHECK(waits.is_contiguous() && waits.size(1) == kWaitFields, "waits must be [n, ", kWaitFields, "]");
  STD_TORCH_CHECK(n >= 1 && n <= waits.size(0), "there are no ", n, " of ", waits.size(0), " waits");
}

// Makes waits[0] the step at which every row is current.
void table_wait_from(const Tensor& waits) {
  check_waits(waits, 1);
  *reinterpret_cast<Wait*>(waits.mutable_data_ptr<double>()) = wait_from_here();
}

// Takes note, in waits[n], of the step with these numbers; returns the first of the waits that go on.
int64_t table_wait(const Tensor& waits, int64_t n, int64_t front, std::vector<double> numbers) {
  check_waits(waits, 1);
  STD_TORCH_CHECK(n >= 1 && n < waits.size(0), "there is no place for wait ", n, " of ", waits.size(0));
  STD_TORCH_CHECK(front >= 0 && front <= n, "there is no wait ", front, " of ", n);
  return wait_a_step(reinterpret_cast<Wait*>(waits.mutable_data_ptr<double>()), n, front, step_of(numbers));
}

// Brings the rows (without a list: all) to the newest of n waits, the first of which is step `first_step`.
void table_close(const Tensor& p, std::vector<Tensor> states, const Tensor& last, int64_t rule, const Tensor& waits,
                 int64_t n, int64_t first_step, std::optional<Tensor> rows) {
  STD_TORCH_CHECK(rule == kAdam || rule == kAdamW, "rule ", rule, " has no closed form");
  const Table table = checked_table(p, states, last, rule);
  check_waits(waits, n);
  STD_TORCH_CHECK(first_step >= 0 && first_step <= INT32_MAX - n, "the steps ", first_step, " and on are out of range");
  const Waits all = {reinterpret_cast<const Wait*>(waits.const_data_ptr<double>()), first_step, n};
  const int64_t* listed = rows ? checked_rows(*rows, table.rows) : nullptr;
  all_reached(0, rows ? rows->size(0) : table.rows,
              [&](int64_t from, int64_t to) { return kernels().close(table, all, listed, from, to); });
}

// Asks for huge pages where the tensors lie, for those of many megabytes: rows that are read in no order then find
// their address in the processor's table of pages. Nothing but time depends on it, so that a refusal is no error.
void in_huge_pages(std::vector<Tensor> tensors) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack: at once, not by and by
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "only memory of the CPU has pages");
    const auto at = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = (at + kPage - 1) / kPage * kPage;
    const uintptr_t end = (at + static_cast<uintptr_t>(tensor.numel() * tensor.element_size())) / kPage * kPage;
    if (begin + 4 * kPage > end) continue;
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0) {
      (void)madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
    }
  }
#else
  (void)tensors;
#endif
}

constexpr int64_t kChunk = 4096;          // numbers of a parameter that one thread takes at once
constexpr int64_t kGrainNumbers = 65536;  // and must have in all to be worth waking

// A parameter's share of a dense step.
struct DensePart {
  float* p;
  const float* grad;
  float *first, *second;
  int64_t size, first_chunk;
};

float* dense_data(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == size,
      name, " must be contiguous float32 on the CPU, and of its parameter's size");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace

// Whether all counters stand at number - 1.
bool can_step(const DenseState& all, double number) {
  for (const Tensor& counter : all.counters) {
    if (*dense_data(counter, 1, "a counter") != static_cast<float>(number - 1)) return false;
  }
  return true;
}

// Step `number` of all parameters at once: states holds the parameters' first states, then their second ones (as many
// as the rule has), counters their step numbers (or nothing, where the rule keeps none), which are set to `number`.
// False, and nothing was done: a counter was not number - 1.
bool dense_step(DenseState all, int64_t rule, const std::vector<double>& numbers, double number) {
  const size_t n = all.params.size();
  STD_TORCH_CHECK(rule >= 0 && rule < kRules, "there is no rule ", rule);
  STD_TORCH_CHECK(all.grads.size() == n && all.states.size() == n * static_cast<size_t>(states_of(rule)) &&
                      (all.counters.empty() || all.counters.size() == n),
                  "each parameter must have a gradient, ", states_of(rule), " states and a counter");
  const Step step = step_of(numbers);
  std::vector<DensePart> parts(n);
  int64_t chunks = 0, total = 0;
  for (size_t i = 0; i < n; ++i) {
    DensePart& part = parts[i];
    part.size = all.params[i].numel();
    part.p = dense_data(all.params[i], part.size, "a parameter");
    if (!all.grads[i].is_contiguous()) all.grads[i] = torch::stable::contiguous(all.grads[i]);
    part.grad = dense_data(all.grads[i], part.size, "a gradient");
    part.first = all.states.size() > i ? dense_data(all.states[i], part.size, "a state") : nullptr;
    part.second = all.states.size() > n + i ? dense_data(all.states[n + i], part.size, "a state") : nullptr;
    part.first_chunk = chunks;
    chunks += (part.size + kChunk - 1) / kChunk;
    total += part.size;
  }
  if (!can_step(all, number)) return false;
  for (const Tensor& counter : all.counters) *dense_data(counter, 1, "a counter") = static_cast<float>(number);

  const OptimizerKernels& use = kernels();
  // small tensors make small chunks: how many threads there is work for depends on the numbers
  const int64_t grain = std::max<int64_t>(1, chunks / std::max<int64_t>(1, total / kGrainNumbers));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    size_t i = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (i + 1 < n && parts[i + 1].first_chunk <= chunk) ++i;
      const DensePart& part = parts[i];
      const int64_t at = (chunk - part.first_chunk) * kChunk;
      use.dense(rule, step, part.p + at, part.grad + at, part.first ? part.first + at : nullptr,
                part.second ? part.second + at : nullptr, std::min(kChunk, part.size - at));
    }
  });
  return true;
}

namespace {

bool dense_step_op(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states,
                   std::vector<Tensor> counters, int64_t rule, std::vector<double> numbers, double number) {
  return dense_step({std::move(params), std::move(grads), std::move(states), std::move(counters)}, rule, numbers,
                    number);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "dense_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] counters, int rule, "
      "float[] numbers, float number) -> bool");
  m.def(
      "table_replay(Tensor(a!) p, Tensor(b!)[] states, Tensor(c!) last, int rule, Tensor steps, int first_step, "
      "Tensor? rows, int begin, int end, int upto) -> ()");
  m.def(
      "table_step(Tensor(a!) p, Tensor(b!)[] states, Tensor(c!) last, int rule, Tensor steps, int first_step, "
      "Tensor rows, Tensor grads, bool lazily, int begin, int end) -> ()");
  m.def("table_wait_from(Tensor(a!) waits) -> ()");
  m.def("table_wait(Tensor(a!) waits, int n, int front, float[] numbers) -> int");
  m.def(
      "table_close(Tensor(a!) p, Tensor(b!)[] states, Tensor(c!) last, int rule, Tensor waits, int n, int first_step, "
      "Tensor? rows) -> ()");
  m.def("in_huge_pages(Tensor[] tensors) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("dense_step", FASTMTL_BOX(&dense_step_op));
  m.impl("table_replay", FASTMTL_BOX(&table_replay));
  m.impl("table_step", FASTMTL_BOX(&table_step));
  m.impl("table_wait_from", FASTMTL_BOX(&table_wait_from));
  m.impl("table_wait", FASTMTL_BOX(&table_wait));
  m.impl("table_close", FASTMTL_BOX(&table_close));
  m.impl("in_huge_pages", FASTMTL_BOX(&in_huge_pages));
}

}  // namespace fastmtl::cpu
