// expert_gate on torch tensors: check, allocate, run. What the op means is in fastmtl/ops/expert_gate.py.
#include <algorithm>
#include <optional>

#include "core/expert_gate_bwd.h"
#include "core/expert_gate_fwd.h"
#include "cpu/expert_gate_args.h"
#include "cpu/ops.h"
#include "cpu/runtime.h"

namespace fastmtl::cpu {
namespace {

// bf16 numbers; uninitialised, large ones from the pool.
Tensor empty_bf16(std::vector<int64_t> sizes) { return empty_pooled(sizes, ScalarType::BFloat16, sizeof(Bf16)); }

// The saved tensors: z and the statistics of each hidden layer, then z, the statistics and the weights of the gates,
// then, where T is Bf16, the inputs so.
template <class T>
std::vector<Tensor> new_saved(const ExpertGateLayer& spec, int64_t n_rows) {
  constexpr bool kBf16 = std::is_same_v<T, Bf16>;
  std::vector<Tensor> saved;
  for (int64_t l = 0; l < spec.depth(); ++l) {
    const std::vector<int64_t> sizes{Grouped<T>::size(n_rows, spec.columns(l), spec.group_columns(l))};
    saved.push_back(kBf16 ? empty_bf16(sizes) : empty_f32(sizes));
    saved.push_back(empty_f32({4, spec.columns(l)}));
  }
  if (!spec.gates.empty()) {
    saved.push_back(empty_f32({n_rows, row_stride<float>(spec.gate_columns)}));
    saved.push_back(empty_f32({4, spec.gate_columns}));
    saved.push_back(empty_f32({n_rows, spec.gate_columns}));
  }
  if (kBf16) saved.push_back(empty_bf16({spec.n_inputs, n_rows, row_stride<Bf16>(spec.in_features)}));
  return saved;
}

// Whether a forward in bf16 has left them: only then the last one is none of fp32.
bool saved_in_bf16(const std::vector<Tensor>& saved) {
  return !saved.empty() && saved.back().scalar_type() == ScalarType::BFloat16;
}

// Only the forward writes through the result.
template <class T>
ExpertGateSaved<T> read_saved(const ExpertGateLayer& spec, int64_t n_rows, std::vector<Tensor>& saved) {
  ExpertGateSaved<T> result;
  Reader reader(saved, "saved");
  const auto statistics = [&](int64_t columns) {
    float* first = const_cast<float*>(reader.take(4 * columns));
    return Statistics{first, first + columns, first + 2 * columns, first + 3 * columns};
  };
  for (int64_t l = 0; l < spec.depth(); ++l) {
    const int64_t group = spec.group_columns(l);
    result.z.emplace_back(const_cast<T*>(reader.take<T>(Grouped<T>::size(n_rows, spec.columns(l), group))), n_rows,
                          group);
    result.hidden.push_back(statistics(spec.columns(l)));
  }
  if (!spec.gates.empty()) {
    const int64_t columns = spec.gate_columns;
    result.gate_z = {const_cast<float*>(reader.take(Grouped<float>::size(n_rows, columns, columns))), n_rows, columns};
    result.gate = statistics(columns);
    result.weights = const_cast<float*>(reader.take(n_rows * columns));
  }
  if constexpr (std::is_same_v<T, Bf16>) {
    result.ld_x = row_stride<Bf16>(spec.in_features);
    result.x = const_cast<Bf16*>(reader.take<Bf16>(spec.n_inputs * n_rows * result.ld_x));
  }
  reader.done();
  return result;
}

Inputs read_inputs(const ExpertGateLayer& spec, const Tensor& x) {
  check_cpu(x, ScalarType::Float, 3, "x");
  STD_TORCH_CHECK(x.size(0) == spec.n_inputs && x.size(2) == spec.in_features, "x must be [", spec.n_inputs, ", B, ",
                  spec.in_features, "], not [", x.size(0), ", B, ", x.size(2), "]");
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

// Small tables that are folded into the first layer and the gates; the layer's x then lacks their columns.
class Folded {
 public:
  // places: [n, 3] int64, for each table the first of its columns in the weights, its first row in `table` and its
  // rows; picks: [B, n] int32, of the tables' rows counted through, the one that each row of the batch reads, or the
  // number of all of them, which stands for none. All three or none of them.
  Folded(ExpertGateLayer& spec, const std::optional<Tensor>& places, const std::optional<Tensor>& table,
         const std::optional<Tensor>& picks) {
    STD_TORCH_CHECK(places.has_value() == table.has_value() && places.has_value() == picks.has_value(),
                    "places, table and picks must be given together");
    if (!places) return;
    check_cpu(*places, ScalarType::Long, 2, "places");
    check_cpu(*table, ScalarType::Float, 2, "table");
    check_cpu(*picks, ScalarType::Int, 2, "picks");
    const int64_t n = places->size(0), dim = table->size(1);
    STD_TORCH_CHECK(places->is_contiguous() && places->size(1) == 3, "places must be [n, 3] contiguous");
    STD_TORCH_CHECK(picks->is_contiguous() && picks->size(1) == n, "picks must be [B, ", n, "] contiguous");
    STD_TORCH_CHECK(table->is_contiguous(), "table must be contiguous");
    STD_TORCH_CHECK(spec.n_inputs == 1 && spec.depth() > 0, "tables are folded into hidden layers that read one input");
    const int64_t* at = places->const_data_ptr<int64_t>();
    std::vector<SmallTable> tables;
    int64_t column = 0;
    for (int64_t t = 0; t < n; ++t, at += 3) {
      STD_TORCH_CHECK(at[0] >= column && at[0] <= spec.in_features - dim, "table ", t, " has no columns of its own");
      STD_TORCH_CHECK(at[1] >= 0 && at[2] >= 0 && at[1] <= table->size(0) - at[2], "table ", t,
                      " ends behind its rows");
      STD_TORCH_CHECK(at[2] <= kMostRows, "table ", t, " has ", at[2], " rows, which are too many to be folded");
      column = at[0] + dim;
      tables.push_back({at[0], dim, at[2], table->const_data_ptr<float>() + at[1] * dim});
    }
    small_.emplace(SmallInputs{SmallTables(tables, spec.in_features), picks->const_data_ptr<int32_t>()});
    STD_TORCH_CHECK(small_->tables.zero_row() <= kMostRows, "the tables have too many rows to be folded");
    rows_ = picks->size(0);
    const uint32_t last = static_cast<uint32_t>(small_->tables.zero_row());
    uint32_t bad = 0;  // its first bit: of a negative one, or one behind the last
    for (int64_t i = 0; i < rows_ * n; ++i) {
      const uint32_t pick = static_cast<uint32_t>(small_->picks[i]);
      bad |= pick | (last - pick);
    }
    STD_TORCH_CHECK(bad >> 31 == 0, "picks name no row");
    spec.in_features = small_->tables.kept_columns();
    spec.n_folded = n;
  }
  const SmallInputs* get() const { return small_ ? &*small_ : nullptr; }
  void check_rows(int64_t n_rows) const {
    STD_TORCH_CHECK(!small_ || rows_ == n_rows, "picks has ", rows_, " rows, x has ", n_rows);
  }

 private:
  static constexpr int64_t kMostRows = 1 << 14;  // whose sums fit into memory
  std::optional<SmallInputs> small_;
  int64_t rows_ = 0;
};

// Returns the output, then the saved tensors.
std::vector<Tensor> expert_gate_fwd(const Tensor& input, std::vector<Tensor> learned, std::vector<Tensor> running,
                                    const Tensor& plan, bool training, double dropout, int64_t seed, bool bf16,
                                    std::optional<Tensor> places, std::optional<Tensor> table,
                                    std::optional<Tensor> picks) {
  ExpertGateLayer spec = checked_layer(plan);
  const Folded folded(spec, places, table, picks);
  const Tensor x = dense_rows(input);
  const Inputs inputs = read_inputs(spec, x);
  const int64_t n_rows = x.size(1), depth = spec.depth();
  folded.check_rows(n_rows);
  ExpertGateParams params = read_learned(spec, learned);
  read_running(spec, running, params);
  const int64_t matrices = spec.gates.empty() ? spec.n_experts : static_cast<int64_t>(spec.gates.size());
  Tensor out =
      spec.output_layer ? empty_f32({n_rows, spec.n_experts}) : empty_f32({matrices, n_rows, spec.dims[depth - 1]});
  const auto run = [&]<class T>(T) {
    std::vector<Tensor> saved = new_saved<T>(spec, n_rows), listed = saved;
    const ExpertGateSaved<T> to_save = read_saved<T>(spec, n_rows, listed);
    const TorchRuntime runtime;
    ExpertGateForward<T, TorchRuntime>(runtime, spec, params, inputs, n_rows, training, dropout, seed, to_save,
                                       out.mutable_data_ptr<float>(), folded.get())
        .run();
    saved.insert(saved.begin(), out);
    return saved;
  };
  return bf16 ? run(Bf16{}) : run(float{});
}

// Returns the gradients of `learned`, in its order, then where x_columns >= 0 that of so many of x's first columns and,
// where tables are folded, those of their rows counted through.
std::vector<Tensor> expert_gate_bwd(const Tensor& grad, const Tensor& input, std::vector<Tensor> learned,
                                    std::vector<Tensor> saved, const Tensor& plan, bool training, double dropout,
                                    int64_t seed, int64_t x_columns, std::optional<Tensor> places,
                                    std::optional<Tensor> table, std::optional<Tensor> picks) {
  ExpertGateLayer spec = checked_layer(plan);
  const Folded folded(spec, places, table, picks);
  const Tensor x = dense_rows(input);
  const Inputs inputs = read_inputs(spec, x);
  const int64_t n_rows = x.size(1), depth = spec.depth();
  folded.check_rows(n_rows);
  const ExpertGateParams params = read_learned(spec, learned);
  const Tensor dout = dense_rows(grad);
  OutputGrad dout_view;
  if (spec.output_layer) {
    check_cpu(dout, ScalarType::Float, 2, "grad");
    STD_TORCH_CHECK(dout.size(0) == n_rows && dout.size(1) == spec.n_experts, "grad must be [B, E]");
    dout_view = {dout.const_data_ptr<float>(), 0, dout.stride(0)};
  } else {
    check_cpu(dout, ScalarType::Float, 3, "grad");
    const int64_t matrices = spec.gates.empty() ? spec.n_experts : static_cast<int64_t>(spec.gates.size());
    STD_TORCH_CHECK(dout.size(0) == matrices && dout.size(1) == n_rows && dout.size(2) == spec.dims[depth - 1],
                    "grad must have the output's shape");
    dout_view = {dout.const_data_ptr<float>(), dout.stride(0), dout.stride(1)};
  }

  std::vector<Tensor> results;
  for (const Tensor& tensor : learned) results.push_back(empty_like_f32(tensor));
  ExpertGateGrads grads;
  Reader reader(results, "gradients");
  grads.hidden.resize(static_cast<size_t>(depth));
  for (int64_t l = 0; l < depth; ++l) grads.hidden[l].weight = reader.take_mutable(learned[l].numel());
  for (int64_t l = 0; l < depth; ++l) grads.hidden[l].bias = reader.take_mutable(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l) grads.hidden[l].gamma = reader.take_mutable(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l) grads.hidden[l].beta = reader.take_mutable(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l)
    grads.alpha.push_back(learns(spec) ? reader.take_mutable(spec.n_experts) : nullptr);
  if (spec.output_layer) {
    grads.out_weight = reader.take_mutable(spec.n_experts * (depth ? spec.dims[depth - 1] : spec.in_features));
    grads.out_bias = reader.take_mutable(spec.n_experts);
  }
  if (!spec.gates.empty()) {
    grads.gate.weight = reader.take_mutable(spec.gate_columns * spec.weight_columns);
    grads.gate.bias = reader.take_mutable(spec.gate_columns);
    grads.gate.gamma = reader.take_mutable(spec.gate_columns);
    grads.gate.beta = reader.take_mutable(spec.gate_columns);
  }
  reader.done();
  float *dx = nullptr, *dsmall = nullptr;
  const bool needs_x = x_columns >= 0;
  STD_TORCH_CHECK(x_columns <= spec.in_features, "x has ", spec.in_features, " columns, not ", x_columns);
  STD_TORCH_CHECK(!needs_x || depth > 0 || x_columns == spec.in_features,
                  "an output layer alone gives all of x's columns");
  if (needs_x) {
    results.push_back(empty_f32({spec.n_inputs, n_rows, x_columns}));
    dx = results.back().mutable_data_ptr<float>();
  }
  if (needs_x && folded.get()) {
    results.push_back(empty_f32({folded.get()->tables.zero_row(), table->size(1)}));
    dsmall = results.back().mutable_data_ptr<float>();
  }
  const auto run = [&]<class T>(T) {
    const ExpertGateSaved<T> from_saved = read_saved<T>(spec, n_rows, saved);
    const TorchRuntime runtime;
    ExpertGateBackward<T, TorchRuntime>(runtime, spec, params, inputs, n_rows, training, dropout, seed, from_saved,
                                        dout_view, grads, dx, std::max<int64_t>(0, x_columns), folded.get(), dsmall)
        .run();
  };
  if (saved_in_bf16(saved)) {
    run(Bf16{});
  } else {
    run(float{});
  }
  return results;
}

// Returns the losses [T] and the gradient of their weighted sum by the logits [B, T].
std::vector<Tensor> task_losses(const Tensor& logits, const Tensor& labels, const Tensor& is_classification,
                                const Tensor& factors) {
  check_cpu(logits, ScalarType::Float, 2, "logits");
  check_cpu(labels, ScalarType::Float, 2, "labels");
  check_cpu(is_classification, ScalarType::Bool, 1, "is_classification");
  check_cpu(factors, ScalarType::Float, 1, "factors");
  const int64_t n_rows = logits.size(0), n_tasks = logits.size(1);
  STD_TORCH_CHECK(labels.size(0) == n_rows && labels.size(1) == n_tasks, "labels must have the logits' shape");
  STD_TORCH_CHECK(is_classification.size(0) == n_tasks && factors.size(0) == n_tasks,
                  "is_classification and factors must have an entry for each of the ", n_tasks, " tasks");
  const Tensor z = torch::stable::contiguous(logits), y = torch::stable::contiguous(labels),
               kinds = torch::stable::contiguous(is_classification), weights = torch::stable::contiguous(factors);
  Tensor losses = empty_f32({n_tasks}), grad = empty_f32({n_rows, n_tasks});
  best_kernels().task_losses(n_rows, n_tasks, z.const_data_ptr<float>(), y.const_data_ptr<float>(),
                             kinds.const_data_ptr<bool>(), weights.const_data_ptr<float>(),
                             losses.mutable_data_ptr<float>(), grad.mutable_data_ptr<float>());
  return {losses, grad};
}

}  // namespace

// A chain of layers in training, each of which reads what the one before made, and the last of which makes the tasks'
// logits: forward, losses and backward. `learned` and `running` are theirs one layer behind the other; tables may be
// folded into the first. Returns the losses, the logits, the gradients of `learned`, then where x_columns >= 0 that of
// so many of x's first columns and, where tables are folded, those of their rows.
std::vector<Tensor> chain_gradients(const Tensor& x, std::vector<Tensor> learned, std::vector<Tensor> running,
                                    std::vector<Tensor> plans, std::vector<double> dropouts, std::vector<int64_t> seeds,
                                    bool bf16, const Tensor& labels, const Tensor& is_classification,
                                    const Tensor& factors, int64_t x_columns, std::optional<Tensor> places,
                                    std::optional<Tensor> table, std::optional<Tensor> picks) {
  const size_t n = plans.size();
  check_cpu(x, ScalarType::Float, 3, "x");
  if (places) check_cpu(*places, ScalarType::Long, 2, "places");
  STD_TORCH_CHECK(n > 0 && dropouts.size() == n && seeds.size() == n, "dropouts and seeds need one for each of ", n,
                  " layers");
  std::vector<std::vector<Tensor>> learned_of(n), running_of(n), saved(n);
  size_t at = 0, running_at = 0;
  double work = 0;  // its sizes are checked later
  const auto take = [](const std::vector<Tensor>& from, size_t& first, size_t count, const char* name) {
    STD_TORCH_CHECK(count <= from.size() - first, name, " lacks tensors");
    first += count;
    return std::vector<Tensor>(from.begin() + first - count, from.begin() + first);
  };
  for (size_t l = 0; l < n; ++l) {
    ExpertGateLayer spec = checked_layer(plans[l]);
    learned_of[l] = take(learned, at, n_learned(spec), "learned");
    running_of[l] = take(running, running_at, n_running(spec), "running");
    if (l == 0) spec.n_folded = places ? places->size(0) : 0;
    work += 2.0 * static_cast<double>(x.size(1)) * static_cast<double>(spec.row_work());
  }
  STD_TORCH_CHECK(at == learned.size() && running_at == running.size(), "there are parameters of no layer");

  std::vector<Tensor> results;
  const auto run = [&] {
    std::vector<Tensor> inputs{x};
    const auto given = [&](size_t l, const std::optional<Tensor>& tensor) {
      return l == 0 ? tensor : std::optional<Tensor>();
    };
    for (size_t l = 0; l < n; ++l) {
      saved[l] = expert_gate_fwd(inputs[l], learned_of[l], running_of[l], plans[l], true, dropouts[l], seeds[l], bf16,
                                 given(l, places), given(l, table), given(l, picks));
      inputs.push_back(saved[l].front());
      saved[l].erase(saved[l].begin());
    }
    results = task_losses(inputs.back(), labels, is_classification, factors);
    Tensor grad = results.back();
    results.back() = inputs.back();
    results.resize(2 + learned.size(), grad);
    std::vector<Tensor> of_x;
    size_t end = results.size();
    for (size_t l = n; l-- > 0;) {
      std::vector<Tensor> grads = expert_gate_bwd(grad, inputs[l], learned_of[l], std::exchange(saved[l], {}), plans[l],
                                                  true, dropouts[l], seeds[l], l > 0 ? inputs[l].size(2) : x_columns,
                                                  given(l, places), given(l, table), given(l, picks));
      const size_t count = learned_of[l].size();
      std::copy_n(grads.begin(), count, results.begin() + static_cast<int64_t>(end -= count));
      if (grads.size() > count) grad = grads[count];
      if (l == 0) of_x.assign(grads.begin() + static_cast<int64_t>(count), grads.end());
    }
    results.insert(results.end(), of_x.begin(), of_x.end());
  };
  // as many as the backward alone is worth
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), Tiles(x.size(1)).count);
  HeldTeam::hold(static_cast<int64_t>(std::min(static_cast<double>(most), work / kThreadWork)), run);
  return results;
}

namespace {

std::string isa() { return best_kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "expert_gate_fwd(Tensor x, Tensor[] learned, Tensor(a!)[] running, Tensor plan, bool training, float dropout, "
      "int "
      "seed, bool bf16=False, Tensor? places=None, Tensor? table=None, Tensor? picks=None) -> Tensor[]");
  m.def(
      "expert_gate_bwd(Tensor grad, Tensor x, Tensor[] learned, Tensor[] saved, Tensor plan, bool training, float "
      "dropout, int seed, int x_columns, Tensor? places=None, Tensor? table=None, Tensor? picks=None) -> Tensor[]");
  m.def("task_losses(Tensor logits, Tensor labels, Tensor is_classification, Tensor factors) -> Tensor[]");
  m.def(
      "chain_gradients(Tensor x, Tensor[] learned, Tensor(a!)[] running, Tensor[] plans, float[] dropouts, int[] "
      "seeds, "
      "bool bf16, Tensor labels, Tensor is_classification, Tensor factors, int x_columns, Tensor? places=None, Tensor? "
      "table=None, Tensor? picks=None) -> Tensor[]");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("expert_gate_fwd", FASTMTL_BOX(&expert_gate_fwd));
  m.impl("expert_gate_bwd", FASTMTL_BOX(&expert_gate_bwd));
  m.impl("task_losses", FASTMTL_BOX(&task_losses));
  m.impl("chain_gradients", FASTMTL_BOX(&chain_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) { m.impl("isa", FASTMTL_BOX(&isa)); }

}  // namespace fastmtl::cpu
