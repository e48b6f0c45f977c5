// expert_gate on torch tensors: check, allocate, run. What the op means is in fastmtl/ops/expert_gate.py.
#include "core/expert_gate_bwd.h"
#include "core/expert_gate_fwd.h"
#include "cpu/runtime.h"

namespace fastmtl::cpu {
namespace {

// The plan (int64): I, N, E, L, activation, G, output_layer, C | dims [L] | for each input the first and last + 1 of
// its experts [N, 2], and of its gates' columns [N, 2] | for each gate its first column, its fan-in, its experts. The
// layer points into the plan, which must outlive it.
ExpertGateLayer checked_layer(const Tensor& plan) {
  check_cpu(plan, ScalarType::Long, 1, "plan");
  STD_TORCH_CHECK(plan.is_contiguous(), "plan must be contiguous");
  const int64_t* at = plan.const_data_ptr<int64_t>();
  const int64_t* const end = at + plan.size(0);
  const auto take = [&](int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= end - at, "plan is too short");
    const int64_t* from = at;
    at += n;
    return from;
  };
  const int64_t* head = take(8);
  ExpertGateLayer spec;
  spec.in_features = head[0];
  spec.n_inputs = head[1];
  spec.n_experts = head[2];
  spec.activation = head[4];
  spec.output_layer = head[6] != 0;
  spec.gate_columns = head[7];
  STD_TORCH_CHECK(spec.in_features >= 0 && spec.n_inputs >= 1 && spec.n_experts >= 1, "plan: bad sizes");
  STD_TORCH_CHECK(spec.activation >= 0 && spec.activation < kActivations, "plan: no activation ", spec.activation);
  const int64_t* dims = take(head[3]);
  spec.dims.assign(dims, dims + head[3]);
  for (int64_t width : spec.dims) STD_TORCH_CHECK(width >= 1, "plan: an empty layer");
  STD_TORCH_CHECK(!spec.dims.empty() || spec.output_layer, "plan: neither a hidden layer nor an output layer");
  STD_TORCH_CHECK(head[5] == 0 || !spec.output_layer, "plan: gates and an output layer");
  const auto ranges = [&](int64_t limit) {
    std::vector<Range> result;
    int64_t covered = 0;
    for (int64_t n = 0; n < spec.n_inputs; ++n) {
      const int64_t* pair = take(2);
      STD_TORCH_CHECK(pair[0] == covered && pair[1] >= covered, "plan: ranges of inputs must follow each other");
      covered = pair[1];
      result.push_back({pair[0], pair[1]});
    }
    STD_TORCH_CHECK(covered == limit, "plan: ranges of inputs must cover everything");
    return result;
  };
  spec.experts_of = ranges(spec.n_experts);
  spec.gate_columns_of = ranges(spec.gate_columns);
  int64_t column = 0;
  for (int64_t g = 0; g < head[5]; ++g) {
    const int64_t* gate = take(2);
    const int64_t* experts = take(gate[1]);
    STD_TORCH_CHECK(gate[0] == column && gate[1] >= 1, "plan: gates must follow each other");
    for (int64_t k = 0; k < gate[1]; ++k) {
      STD_TORCH_CHECK(experts[k] >= 0 && experts[k] < spec.n_experts, "plan: a gate names no expert");
    }
    column += gate[1];
    spec.gates.push_back({gate[0], gate[1], experts});
  }
  STD_TORCH_CHECK(column == spec.gate_columns, "plan: gates must cover their columns");
  return spec;
}

// Hands out the tensors of a list in order, each checked for its size.
class Reader {
 public:
  Reader(std::vector<Tensor>& list, const char* name) : list_(list), name_(name) {}
  const float* take(int64_t numel) { return checked(numel).const_data_ptr<float>(); }
  float* take_mutable(int64_t numel) {
    STD_TORCH_CHECK(next_ < list_.size() && list_[next_].is_contiguous(), name_, "[", next_, "] must be contiguous");
    return checked(numel).mutable_data_ptr<float>();
  }
  void done() const { STD_TORCH_CHECK(next_ == list_.size(), name_, " has ", list_.size(), " tensors, not ", next_); }

 private:
  const Tensor& checked(int64_t numel) {
    STD_TORCH_CHECK(next_ < list_.size(), name_, " has only ", list_.size(), " tensors");
    Tensor& tensor = list_[next_];
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float, name_, "[", next_,
                    "] must be float32 on the CPU");
    STD_TORCH_CHECK(tensor.numel() == numel, name_, "[", next_, "] must have ", numel, " elements, not ",
                    tensor.numel());
    if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
    ++next_;
    return tensor;
  }
  std::vector<Tensor>& list_;
  const char* name_;
  size_t next_ = 0;
};

bool learns(const ExpertGateLayer& spec) { return spec.activation == kPRelu || spec.activation == kDice; }

// `learned` in the order of fastmtl.spec.ExpertGateParams.learned; keeps copies alive where a tensor was not
// contiguous.
ExpertGateParams read_learned(const ExpertGateLayer& spec, std::vector<Tensor>& learned) {
  ExpertGateParams params;
  Reader reader(learned, "learned");
  const int64_t depth = spec.depth();
  params.hidden.resize(static_cast<size_t>(depth));
  for (int64_t l = 0; l < depth; ++l) params.hidden[l].weight = reader.take(spec.columns(l) * spec.fan_in(l));
  for (int64_t l = 0; l < depth; ++l) params.hidden[l].bias = reader.take(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l) params.hidden[l].gamma = reader.take(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l) params.hidden[l].beta = reader.take(spec.columns(l));
  for (int64_t l = 0; l < depth; ++l) params.alpha.push_back(learns(spec) ? reader.take(spec.n_experts) : nullptr);
  if (spec.output_layer) {
    const int64_t width = depth ? spec.dims[depth - 1] : spec.in_features;
    params.out_weight = reader.take(spec.n_experts * width);
    params.out_bias = reader.take(spec.n_experts);
  }
  if (!spec.gates.empty()) {
    params.gate.weight = reader.take(spec.gate_columns * spec.in_features);
    params.gate.bias = reader.take(spec.gate_columns);
    params.gate.gamma = reader.take(spec.gate_columns);
    params.gate.beta = reader.take(spec.gate_columns);
  }
  reader.done();
  return params;
}

void read_running(const ExpertGateLayer& spec, std::vector<Tensor>& running, ExpertGateParams& params) {
  Reader reader(running, "running");
  for (int64_t l = 0; l < spec.depth(); ++l) params.hidden[l].running_mean = reader.take_mutable(spec.columns(l));
  for (int64_t l = 0; l < spec.depth(); ++l) params.hidden[l].running_var = reader.take_mutable(spec.columns(l));
  if (!spec.gates.empty()) {
    params.gate.running_mean = reader.take_mutable(spec.gate_columns);
    params.gate.running_var = reader.take_mutable(spec.gate_columns);
  }
  reader.done();
}

// The saved tensors: z and the statistics (see Normalised) of each hidden layer, then z, the statistics and the weights
// of the gates.
std::vector<Tensor> new_saved(const ExpertGateLayer& spec, int64_t n_rows) {
  std::vector<Tensor> saved;
  for (int64_t l = 0; l < spec.depth(); ++l) {
    saved.push_back(empty_f32({n_rows, row_stride(spec.columns(l))}));
    saved.push_back(empty_f32({4, spec.columns(l)}));
  }
  if (!spec.gates.empty()) {
    saved.push_back(empty_f32({n_rows, row_stride(spec.gate_columns)}));
    saved.push_back(empty_f32({4, spec.gate_columns}));
    saved.push_back(empty_f32({n_rows, spec.gate_columns}));
  }
  return saved;
}

// Only the forward writes through the result.
ExpertGateSaved read_saved(const ExpertGateLayer& spec, int64_t n_rows, std::vector<Tensor>& saved) {
  ExpertGateSaved result;
  Reader reader(saved, "saved");
  const auto normalised = [&](int64_t columns) {
    Normalised normal;
    normal.ld = row_stride(columns);
    normal.z = const_cast<float*>(reader.take(n_rows * normal.ld));
    normal.mean = const_cast<float*>(reader.take(4 * columns));
    normal.rstd = normal.mean + columns;
    normal.mean_rest = normal.rstd + columns;
    normal.rstd_rest = normal.mean_rest + columns;
    return normal;
  };
  for (int64_t l = 0; l < spec.depth(); ++l) result.hidden.push_back(normalised(spec.columns(l)));
  if (!spec.gates.empty()) {
    result.gate = normalised(spec.gate_columns);
    result.weights = const_cast<float*>(reader.take(n_rows * spec.gate_columns));
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

// Returns the output, then the saved tensors.
std::vector<Tensor> expert_gate_fwd(const Tensor& input, std::vector<Tensor> learned, std::vector<Tensor> running,
                                    const Tensor& plan, bool training, double dropout, int64_t seed) {
  const ExpertGateLayer spec = checked_layer(plan);
  const Tensor x = dense_rows(input);
  const Inputs inputs = read_inputs(spec, x);
  const int64_t n_rows = x.size(1), depth = spec.depth();
  ExpertGateParams params = read_learned(spec, learned);
  read_running(spec, running, params);
  std::vector<Tensor> saved = new_saved(spec, n_rows);
  const ExpertGateSaved to_save = read_saved(spec, n_rows, saved);
  const int64_t matrices = spec.gates.empty() ? spec.n_experts : static_cast<int64_t>(spec.gates.size());
  Tensor out =
      spec.output_layer ? empty_f32({n_rows, spec.n_experts}) : empty_f32({matrices, n_rows, spec.dims[depth - 1]});
  const TorchRuntime runtime;
  ExpertGateForward(runtime, spec, params, inputs, n_rows, training, dropout, seed, to_save,
                    out.mutable_data_ptr<float>())
      .run();
  saved.insert(saved.begin(), out);
  return saved;
}

// Returns the gradients of `learned`, in its order, then that of x where it is wanted.
std::vector<Tensor> expert_gate_bwd(const Tensor& grad, const Tensor& input, std::vector<Tensor> learned,
                                    std::vector<Tensor> saved, const Tensor& plan, bool training, double dropout,
                                    int64_t seed, bool needs_x) {
  const ExpertGateLayer spec = checked_layer(plan);
  const Tensor x = dense_rows(input);
  const Inputs inputs = read_inputs(spec, x);
  const int64_t n_rows = x.size(1), depth = spec.depth();
  const ExpertGateParams params = read_learned(spec, learned);
  const ExpertGateSaved from_saved = read_saved(spec, n_rows, saved);

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
  for (const Tensor& tensor : learned) results.push_back(torch::stable::empty_like(tensor));
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
    grads.gate.weight = reader.take_mutable(spec.gate_columns * spec.in_features);
    grads.gate.bias = reader.take_mutable(spec.gate_columns);
    grads.gate.gamma = reader.take_mutable(spec.gate_columns);
    grads.gate.beta = reader.take_mutable(spec.gate_columns);
  }
  reader.done();
  float* dx = nullptr;
  if (needs_x) {
    results.push_back(empty_f32({spec.n_inputs, n_rows, spec.in_features}));
    dx = results.back().mutable_data_ptr<float>();
  }
  const TorchRuntime runtime;
  ExpertGateBackward(runtime, spec, params, inputs, n_rows, training, dropout, seed, from_saved, dout_view, grads, dx)
      .run();
  return results;
}

std::string isa() { return best_kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "expert_gate_fwd(Tensor x, Tensor[] learned, Tensor(a!)[] running, Tensor plan, bool training, float dropout, "
      "int "
      "seed) -> Tensor[]");
  m.def(
      "expert_gate_bwd(Tensor grad, Tensor x, Tensor[] learned, Tensor[] saved, Tensor plan, bool training, float "
      "dropout, int seed, bool needs_x) -> Tensor[]");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("expert_gate_fwd", TORCH_BOX(&expert_gate_fwd));
  m.impl("expert_gate_bwd", TORCH_BOX(&expert_gate_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

}  // namespace fastmtl::cpu
