// The tables' kernels on torch tensors: check, allocate, run on torch's current stream. What they mean is in
// fastmtl/ops/embedding_bag.py and core/optimizer.h. Nothing here waits for the device.
#include <thrust/iterator/counting_iterator.h>
#include <torch/csrc/stable/library.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_select.cuh>
#include <limits>
#include <optional>
#include <vector>

#include "boxed.h"
#include "cuda/backward.h"
#include "cuda/gpu.h"

namespace fastmtl::cuda {
namespace {

struct IsStart {
  const uint32_t* keys;
  __device__ __forceinline__ bool operator()(int32_t i) const { return i == 0 || keys[i] != keys[i - 1]; }
};

// What backward.h asks of a device.
class TableGpu : public Gpu {
 public:
  using Gpu::Gpu;
  template <class... Parameters, class... Args>
  void run(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, Args... args) {
    run_threads(kernel, blocks, kThreads, shared, args...);
  }
  void sort(const uint32_t* keys, const int32_t* order, uint32_t* keys_out, int32_t* order_out, int64_t n, int bits) {
    with_storage("sort", [&](void* storage, size_t& size) {
      return cub::DeviceRadixSort::SortPairs(storage, size, keys, keys_out, order, order_out, n, 0, bits, stream_);
    });
  }
  void starts(const uint32_t* keys, int64_t n, int32_t* out, int32_t* count) {
    with_storage("select", [&](void* storage, size_t& size) {
      return cub::DeviceSelect::If(storage, size, thrust::counting_iterator<int32_t>(0), out, count, n, IsStart{keys},
                                   stream_);
    });
  }

 private:
  template <class F>
  void with_storage(const char* what, const F& f) {
    size_t size = 0;
    check(f(nullptr, size), what);
    check(f(bytes(static_cast<int64_t>(std::max<size_t>(size, 1))), size), what);
  }
};

// A table, its states as many as the rule has.
Target checked_target(const Tensor& p, const std::vector<Tensor>& states, const Tensor& last, int64_t rule) {
  const int64_t rows = p.size(0), dim = p.size(1);
  check_tensor(p, ScalarType::Float, {rows, dim}, "the table");
  check_tensor(last, ScalarType::Int, {rows}, "last");
  STD_TORCH_CHECK(rule >= 0 && rule <= kRowwiseAdagrad, "there is no rule ", rule);
  const int64_t wanted = rule == kRowwiseAdagrad ? 1 : states_of(rule);
  STD_TORCH_CHECK(static_cast<int64_t>(states.size()) == wanted, "rule ", rule, " has ", wanted, " states");
  float* state[2] = {nullptr, nullptr};
  for (size_t i = 0; i < states.size(); ++i) {
    if (rule == kRowwiseAdagrad) {
      check_tensor(states[i], ScalarType::Float, {rows}, "a state");
    } else {
      check_tensor(states[i], ScalarType::Float, {rows, dim}, "a state");
    }
    state[i] = data<float>(states[i]);
  }
  return {nullptr, nullptr, data<float>(p), state[0], state[1], data<int32_t>(last), nullptr, nullptr, dim};
}

// Whether rows can be read 16 bytes at a time.
bool rows_are_aligned(const Target& t) {
  return t.dim % 4 == 0 && aligned(t.out) && aligned(t.p) && aligned(t.first) && aligned(t.second);
}

void check_rowwise(int64_t rule, const Target& t, bool vectors) {
  STD_TORCH_CHECK(rule != kRowwiseAdagrad || t.dim <= (vectors ? 128 : 32), "row-wise Adagrad: rows of ", t.dim,
                  " columns are too wide for a warp; the triton backend takes them");
}

IdView checked_ids(const Tensor& ids) {
  STD_TORCH_CHECK(ids.is_cuda() && ids.dim() == 2, "ids [B, S] must be on a GPU");
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, "ids must be int32 or int64");
  return {ids.mutable_data_ptr(), ids.stride(0), ids.stride(1), wide};
}

// plan: bags [n_bags, 12] int64, columns [n_sorted, 2], tables [n, 4], lookups [m, 3] int32, places [n_tiny_rows]
// int64; see embedding_plan.py.
Shape checked_plan(const Tensor& ids, const std::vector<Tensor>& plan, int64_t n_tiny, int64_t n_table_rows) {
  STD_TORCH_CHECK(plan.size() == 5, "a plan has five tensors");
  check_tensor(plan[0], ScalarType::Long, {-1, kBagPlanFields}, "bags");
  check_tensor(plan[1], ScalarType::Int, {-1, 2}, "columns");
  check_tensor(plan[2], ScalarType::Int, {-1, 4}, "tables");
  check_tensor(plan[3], ScalarType::Int, {-1, 3}, "lookups");
  check_tensor(plan[4], ScalarType::Long, {-1}, "places");
  const Shape shape = {ids.size(0), plan[0].size(0), plan[1].size(0), n_tiny, n_table_rows};
  STD_TORCH_CHECK(shape.n_rows * std::max(shape.n_sorted, shape.n_tiny) < std::numeric_limits<int32_t>::max() &&
                      n_table_rows < std::numeric_limits<uint32_t>::max(),
                  "more than 2^31 lookups or 2^32 rows");
  return shape;
}

// index: keys [n] int32 (the bits of uint32), order [n] int32, tiny [B, n_tiny] int32, counted [B, n_bags] float32.
SortedOut checked_index(const std::vector<Tensor>& index, const Shape& shape) {
  STD_TORCH_CHECK(index.size() == 4, "an index has four tensors");
  check_tensor(index[0], ScalarType::Int, {shape.n_rows * shape.n_sorted}, "keys");
  check_tensor(index[1], ScalarType::Int, {shape.n_rows * shape.n_sorted}, "order");
  check_tensor(index[2], ScalarType::Int, {shape.n_rows, shape.n_tiny}, "tiny");
  check_tensor(index[3], ScalarType::Float, {shape.n_rows, shape.n_bags}, "counted");
  return {reinterpret_cast<uint32_t*>(data<int32_t>(index[0])), data<int32_t>(index[1]), data<int32_t>(index[2]),
          data<float>(index[3])};
}

// widest: the largest vocabulary of a tiny table. align: a power of two that divides every output column a row begins
// at. index: of these ids, or nothing.
void backward(const Tensor& grad, const Tensor& ids, const std::vector<Tensor>& plan, int64_t n_tiny, int64_t widest,
              int64_t align, bool mean, int64_t n_table_rows, int64_t n_listed, int64_t rule, Target t,
              const std::vector<Tensor>& index) {
  const IdView view = checked_ids(ids);
  STD_TORCH_CHECK(grad.is_cuda() && grad.dim() == 2 && grad.size(0) == ids.size(0), "grad [B, W] must be on the GPU");
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((half || grad.scalar_type() == ScalarType::Float) && (grad.stride(1) == 1 || grad.size(1) <= 1),
                  "grad must be float32 or bfloat16, its rows dense");
  const Shape shape = checked_plan(ids, plan, n_tiny, n_table_rows);
  const bool vectors =
      rows_are_aligned(t) && align % 4 == 0 && grad.stride(0) % 4 == 0 && aligned(grad.mutable_data_ptr());
  check_rowwise(rule, t, vectors);

  TableGpu gpu(ids);
  Sorted sorted;
  if (index.empty()) {
    sorted = sort_rows(gpu, view, reinterpret_cast<const BagPlan*>(data<int64_t>(plan[0])), shape);
  } else {
    const SortedOut made = checked_index(index, shape);
    sorted = {made.keys, made.order, made.tiny, made.counted};
  }
  const Gradient gradient = {grad.mutable_data_ptr(), grad.stride(0), half};
  const auto n_bags = static_cast<int32_t>(shape.n_bags);
  const Lookups lookups = {sorted.keys,
                           sorted.order,
                           gradient,
                           data<int32_t>(plan[1]),
                           sorted.counted,
                           shape.n_rows * shape.n_sorted,
                           static_cast<uint32_t>(n_table_rows),
                           static_cast<int32_t>(shape.n_sorted),
                           n_bags,
                           mean};
  const TinyTables tiny = {sorted.tiny,
                           data<int32_t>(plan[2]),
                           data<int32_t>(plan[3]),
                           data<int64_t>(plan[4]),
                           shape.n_rows,
                           0,
                           static_cast<int32_t>(plan[2].size(0)),
                           static_cast<int32_t>(n_tiny),
                           static_cast<int32_t>(plan[4].size(0)),
                           0};
  const bool known = with_rule(rule, vectors, [&]<int RULE, int VEC>() {
    add_segments<RULE, VEC>(gpu, lookups, t);
    Target listed = t;
    if (t.rows) {  // the tiny tables' rows are listed behind the others
      listed.rows += n_listed;
      listed.out += n_listed * t.dim;
    }
    add_tiny_tables<RULE, VEC>(gpu, tiny, widest, gradient, sorted.counted, n_bags, mean, listed, n_table_rows);
  });
  STD_TORCH_CHECK(known, "there is no rule ", rule);
}

// Gradients: into out [V, D], which must be zero, or, where `rows` is given, listed: out [n_listed + n_tiny_rows, D],
// rows [the same], which must hold V (void).
void embedding_bag_bwd(const Tensor& grad, const Tensor& ids, std::vector<Tensor> plan, int64_t n_tiny, int64_t widest,
                       int64_t align, bool mean, int64_t n_table_rows, const Tensor& out, std::optional<Tensor> rows) {
  check_tensor(out, ScalarType::Float, {-1, -1}, "out");
  Target t{};
  t.out = data<float>(out);
  t.dim = out.size(1);
  int64_t n_listed = 0;
  if (rows) {
    check_tensor(*rows, ScalarType::Long, {out.size(0)}, "rows");
    t.rows = data<int64_t>(*rows);
    n_listed = out.size(0) - plan.at(4).size(0);
    STD_TORCH_CHECK(n_listed >= std::min(ids.size(0) * plan.at(1).size(0), n_table_rows), "out is too short");
  } else {
    STD_TORCH_CHECK(out.size(0) == n_table_rows, "out must have a row for each of the table");
  }
  backward(grad, ids, plan, n_tiny, widest, align, mean, n_table_rows, n_listed, kNoRule, t, {});
}

// The optimizer's step instead: step [9], now [1].
void embedding_bag_bwd_step(const Tensor& grad, const Tensor& ids, std::vector<Tensor> plan, int64_t n_tiny,
                            int64_t widest, int64_t align, bool mean, const Tensor& p, std::vector<Tensor> states,
                            const Tensor& last, int64_t rule, const Tensor& step, const Tensor& now,
                            std::vector<Tensor> index) {
  Target t = checked_target(p, states, last, rule);
  check_tensor(step, ScalarType::Float, {kStepFields}, "step");
  check_tensor(now, ScalarType::Int, {1}, "now");
  t.step = reinterpret_cast<const Step*>(data<float>(step));
  t.now = data<int32_t>(now);
  backward(grad, ids, plan, n_tiny, widest, align, mean, p.size(0), 0, rule, t, index);
}

// Made ahead of the gradient: see checked_index.
void embedding_bag_index(const Tensor& ids, std::vector<Tensor> plan, int64_t n_tiny, int64_t n_table_rows,
                         std::vector<Tensor> out) {
  const IdView view = checked_ids(ids);
  const Shape shape = checked_plan(ids, plan, n_tiny, n_table_rows);
  TableGpu gpu(ids);
  sort_rows(gpu, view, reinterpret_cast<const BagPlan*>(data<int64_t>(plan[0])), shape, checked_index(out, shape));
}

// See table_replay, table_catch_up and table_step of fastmtl/backends/cuda.py. rows: int64, or int32: an index's keys.
void table_rows(const Tensor& p, std::vector<Tensor> states, const Tensor& last, int64_t rule, const Tensor& steps,
                int64_t first_step, std::optional<Tensor> rows, std::optional<Tensor> grads, int64_t n, int64_t start,
                int64_t upto, bool lazily, std::optional<Tensor> clock, const Tensor& behind) {
  const Target t = checked_target(p, states, last, rule);
  check_tensor(steps, ScalarType::Float, {-1, kStepFields}, "steps");
  check_tensor(behind, ScalarType::Int, {1}, "behind");
  STD_TORCH_CHECK(steps.size(0) > 0 && n >= 0, "there is no step to take");
  const bool sorted = rows && rows->scalar_type() == ScalarType::Int;
  if (rows) check_tensor(*rows, sorted ? ScalarType::Int : ScalarType::Long, {n}, "rows");
  STD_TORCH_CHECK(!(sorted && grads), "gradients are of rows that are listed once");
  if (grads) check_tensor(*grads, ScalarType::Float, {n, t.dim}, "grads");
  if (clock) check_tensor(*clock, ScalarType::Int, {1}, "clock");
  const Work work = {rows && !sorted ? data<int64_t>(*rows) : nullptr,
                     sorted ? reinterpret_cast<const uint32_t*>(data<int32_t>(*rows)) : nullptr,
                     grads ? data<float>(*grads) : nullptr,
                     n,
                     start,
                     p.size(0),
                     reinterpret_cast<const Step*>(data<float>(steps)),
                     first_step,
                     steps.size(0),
                     upto,
                     clock ? data<int32_t>(*clock) : nullptr,
                     lazily,
                     data<int32_t>(behind)};
  const bool vectors = rows_are_aligned(t) && aligned(work.grads);
  check_rowwise(rule, t, vectors);
  TableGpu gpu(p);
  with_rule(rule, vectors, [&]<int RULE, int VEC>() {
    if constexpr (RULE != kNoRule) update_rows<RULE, VEC>(gpu, t, work);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fastmtl_cuda, m) {
  m.def(
      "embedding_bag_bwd(Tensor grad, Tensor ids, Tensor[] plan, int n_tiny, int widest, int align, bool mean, "
      "int n_table_rows, Tensor(a!) out, Tensor(b!)? rows) -> ()");
  m.def(
      "embedding_bag_bwd_step(Tensor grad, Tensor ids, Tensor[] plan, int n_tiny, int widest, int align, bool mean, "
      "Tensor(a!) p, Tensor(b!)[] states, Tensor(c!) last, int rule, Tensor step, Tensor now, Tensor[] index) -> ()");
  m.def("embedding_bag_index(Tensor ids, Tensor[] plan, int n_tiny, int n_table_rows, Tensor(a!)[] out) -> ()");
  m.def(
      "table_rows(Tensor(a!) p, Tensor(b!)[] states, Tensor(c!) last, int rule, Tensor steps, int first_step, "
      "Tensor? rows, Tensor? grads, int n, int start, int upto, bool lazily, Tensor? clock, Tensor(d!) behind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl_cuda, CUDA, m) {
  m.impl("embedding_bag_bwd", FASTMTL_BOX(&embedding_bag_bwd));
  m.impl("embedding_bag_bwd_step", FASTMTL_BOX(&embedding_bag_bwd_step));
  m.impl("embedding_bag_index", FASTMTL_BOX(&embedding_bag_index));
  m.impl("table_rows", FASTMTL_BOX(&table_rows));
}

}  // namespace fastmtl::cuda
