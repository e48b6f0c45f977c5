// A layer of experts and gates as torch hands it over: its plan, and its parameters as lists of tensors.
#pragma once

#include "core/expert_gate.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {

// The plan (int64): I, N, E, L, activation, G, output_layer, C | dims [L] | for each input the first and last + 1 of
// its experts [N, 2], and of its gates' columns [N, 2] | for each gate its first column, its fan-in, its experts. The
// layer points into the plan, which must outlive it.
inline ExpertGateLayer checked_layer(const int64_t* at, const int64_t* const end) {
  const auto take = [&](int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= end - at, "plan is too short");
    const int64_t* from = at;
    at += n;
    return from;
  };
  const int64_t* head = take(8);
  ExpertGateLayer spec;
  spec.in_features = spec.weight_columns = head[0];
  spec.n_inputs = head[1];
  spec.n_experts = head[2];
  spec.activation = head[4];
  spec.output_layer = head[6] != 0;
  spec.gate_columns = head[7];
  // no product of two of them overflows
  const auto fits = [](int64_t size, int64_t least) { return size >= least && size <= int64_t{1} << 24; };
  STD_TORCH_CHECK(
      fits(spec.in_features, 0) && fits(spec.n_inputs, 1) && fits(spec.n_experts, 1) && fits(spec.gate_columns, 0),
      "plan: bad sizes");
  STD_TORCH_CHECK(spec.activation >= 0 && spec.activation < kActivations, "plan: no activation ", spec.activation);
  const int64_t* dims = take(head[3]);
  spec.dims.assign(dims, dims + head[3]);
  for (int64_t width : spec.dims) {
    STD_TORCH_CHECK(fits(width, 1) && fits(width * spec.n_experts, 1), "plan: an empty layer, or one too large");
  }
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

inline ExpertGateLayer checked_layer(const Tensor& plan) {
  check_cpu(plan, ScalarType::Long, 1, "plan");
  STD_TORCH_CHECK(plan.is_contiguous(), "plan must be contiguous");
  const int64_t* at = plan.const_data_ptr<int64_t>();
  return checked_layer(at, at + plan.size(0));
}

// Hands out the tensors of a list in order, each checked for its size.
class Reader {
 public:
  Reader(std::vector<Tensor>& list, const char* name) : list_(list), name_(name) {}
  template <class T = float>
  const T* take(int64_t numel) {
    if constexpr (std::is_same_v<T, Bf16>) {
      return static_cast<const Bf16*>(checked(numel, ScalarType::BFloat16).const_data_ptr());
    } else {
      return checked(numel).template const_data_ptr<float>();
    }
  }
  float* take_mutable(int64_t numel) {
    STD_TORCH_CHECK(next_ < list_.size() && list_[next_].is_contiguous(), name_, "[", next_, "] must be contiguous");
    return checked(numel).mutable_data_ptr<float>();
  }
  void done() const { STD_TORCH_CHECK(next_ == list_.size(), name_, " has ", list_.size(), " tensors, not ", next_); }

 private:
  const Tensor& checked(int64_t numel, ScalarType dtype = ScalarType::Float) {
    STD_TORCH_CHECK(next_ < list_.size(), name_, " has only ", list_.size(), " tensors");
    Tensor& tensor = list_[next_];
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name_, "[", next_, "] must be ",
                    dtype == ScalarType::Float ? "float32" : "bfloat16", " on the CPU");
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

inline bool learns(const ExpertGateLayer& spec) { return spec.activation == kPRelu || spec.activation == kDice; }

// How many tensors read_learned and read_running take.
inline size_t n_learned(const ExpertGateLayer& spec) {
  const size_t a_layer = 4 + (learns(spec) ? 1 : 0);
  return spec.dims.size() * a_layer + (spec.output_layer ? 2 : 0) + (spec.gates.empty() ? 0 : 4);
}
inline size_t n_running(const ExpertGateLayer& spec) { return 2 * spec.dims.size() + (spec.gates.empty() ? 0 : 2); }

// `learned` in the order of fastmtl.spec.ExpertGateParams.learned; keeps copies alive where a tensor was not
// contiguous.
inline ExpertGateParams read_learned(const ExpertGateLayer& spec, std::vector<Tensor>& learned) {
  ExpertGateParams params;
  Reader reader(learned, "learned");
  const int64_t depth = spec.depth();
  params.hidden.resize(static_cast<size_t>(depth));
  for (int64_t l = 0; l < depth; ++l) params.hidden[l].weight = reader.take(spec.weight_size(l));
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
    params.gate.weight = reader.take(spec.gate_columns * spec.weight_columns);
    params.gate.bias = reader.take(spec.gate_columns);
    params.gate.gamma = reader.take(spec.gate_columns);
    params.gate.beta = reader.take(spec.gate_columns);
  }
  reader.done();
  return params;
}

inline void read_running(const ExpertGateLayer& spec, std::vector<Tensor>& running, ExpertGateParams& params) {
  Reader reader(running, "running");
  for (int64_t l = 0; l < spec.depth(); ++l) params.hidden[l].running_mean = reader.take_mutable(spec.columns(l));
  for (int64_t l = 0; l < spec.depth(); ++l) params.hidden[l].running_var = reader.take_mutable(spec.columns(l));
  if (!spec.gates.empty()) {
    params.gate.running_mean = reader.take_mutable(spec.gate_columns);
    params.gate.running_var = reader.take_mutable(spec.gate_columns);
  }
  reader.done();
}

}  // namespace fastmtl::cpu
