// Hopper's kernels on torch tensors: check, allocate, run on torch's current stream. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <vector>

#include "boxed.h"
#include "cuda/down.cuh"
#include "cuda/folded.cuh"
#include "cuda/gpu.h"
#include "cuda/up.cuh"

namespace fastmtl::cuda {
namespace {

// f.template operator()<ACT>() for an activation that is known when the program runs.
template <class F>
void with_activation(int64_t activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f.template operator()<kRelu>();
    case kLeakyRelu:
      return f.template operator()<kLeakyRelu>();
    case kSilu:
      return f.template operator()<kSilu>();
    default:
      STD_TORCH_CHECK(false, "there is no activation ", activation);
  }
}

// A layer of experts and gates with its towers, on Hopper: predictions [B, G] of x [B, I] bf16. stages: see Stages of
// fastmtl/backends/triton/folded_stages.py; activation: a number of ACTIVATIONS there.
void folded(const Tensor& x, std::vector<Tensor> stages, std::optional<Tensor> is_probability, int64_t activation,
            const Tensor& out) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1 &&
                      x.stride(0) % 8 == 0 && aligned(x.mutable_data_ptr()),
                  "x [B, I] must be bfloat16 on a GPU, its rows at multiples of 16 bytes");
  STD_TORCH_CHECK(x.size(1) > 64 && x.size(1) <= kMostInput && x.size(0) < std::numeric_limits<int32_t>::max(),
                  "x must have 65 to ", kMostInput, " columns, and fewer than 2^31 rows");
  STD_TORCH_CHECK(stages.size() == 9, "nine tensors make the stages");
  Folded f{};
  f.x = x.mutable_data_ptr();
  f.row_bytes = 2 * x.stride(0);
  f.n_rows = static_cast<int32_t>(x.size(0));
  f.n_in = static_cast<int32_t>(x.size(1));
  const int64_t n_experts = stages[4].size(0), n_gates = stages[4].size(1);
  f.n_experts = static_cast<int32_t>(n_experts);
  f.n_gates = static_cast<int32_t>(n_gates);
  check_tensor(stages[0], ScalarType::Byte, {f.of_tile(), kStageBytes}, "the stages' weights");
  check_tensor(stages[1], ScalarType::Float, {n_experts, kUnits1 + kUnits2}, "biases");
  check_tensor(stages[2], ScalarType::Float, {kGateColumns}, "the gates' biases");
  check_tensor(stages[3], ScalarType::Int, {n_gates + 1}, "the gates' columns");
  check_tensor(stages[4], ScalarType::Int, {n_experts, n_gates}, "members");
  check_tensor(stages[5], ScalarType::Float, {n_gates, kTower1}, "biases of towers");
  check_tensor(stages[6], ScalarType::Float, {n_gates, kTower2}, "biases of towers");
  check_tensor(stages[7], ScalarType::Float, {n_gates, kTower2}, "heads");
  check_tensor(stages[8], ScalarType::Float, {n_gates}, "biases of heads");
  check_tensor(out, ScalarType::Float, {x.size(0), n_gates}, "out");
  if (is_probability) check_tensor(*is_probability, ScalarType::Bool, {n_gates}, "is_probability");
  STD_TORCH_CHECK(n_gates > 0 && aligned(stages[0].mutable_data_ptr()) && aligned(stages[1].mutable_data_ptr()),
                  "there are gates, and stages at multiples of 16 bytes");
  if (f.n_rows == 0) return;
  f.stages = data<unsigned char>(stages[0]);
  f.biases = data<unsigned char>(stages[1]);
  f.gate_bias = data<float>(stages[2]);
  f.gate_columns = data<int32_t>(stages[3]);
  f.members = data<int32_t>(stages[4]);
  f.tower_bias1 = data<float>(stages[5]);
  f.tower_bias2 = data<float>(stages[6]);
  f.head = data<float>(stages[7]);
  f.head_bias = data<float>(stages[8]);
  f.is_probability = is_probability ? data<bool>(*is_probability) : nullptr;
  f.out = data<float>(out);
  Gpu gpu(x);
  const int64_t tiles = (x.size(0) + kProgramRows - 1) / kProgramRows;
  const int64_t programs = std::min(tiles, gpu.multiprocessors());
  f.left = gpu.scratch<uint4>(programs * n_experts * 2 * 8 * kWarpgroup);
  with_activation(activation, [&]<int ACT>() {
    gpu.run_threads(folded_kernel<ACT>, programs, kFoldedThreads, FoldedRoom::bytes, f, static_cast<int32_t>(tiles));
  });
}

constexpr int64_t kMostPitch = int64_t{1} << 24;  // what kernels step by, some rows of bf16, is of 32 bits

// A matrix [n_rows, at least n] of bf16 that kernels read and write 16 bytes at a time.
char* checked_matrix(const Tensor& matrix, int64_t n_rows, int64_t n, const char* name) {
  STD_TORCH_CHECK(matrix.is_cuda() && matrix.dim() == 2 && matrix.scalar_type() == ScalarType::BFloat16 &&
                      matrix.size(0) == n_rows && matrix.size(1) >= n && matrix.stride(1) == 1 &&
                      matrix.stride(0) % 8 == 0 && matrix.stride(0) <= kMostPitch && aligned(matrix.mutable_data_ptr()),
                  name, " must be bfloat16 on a GPU, ", n_rows, " rows of ", n,
                  " or more at multiples of 16 bytes, at most ", kMostPitch, " numbers apart");
  return data<char>(matrix);
}

int64_t checked_units(int64_t units, int64_t most, const char* name) {
  STD_TORCH_CHECK(units > 0 && units <= most && units % 8 == 0, name, " must be a multiple of 8, ", most, " at most");
  return units;
}

// Programs for `per_run` of them a run of rows of the batch.
int64_t checked_programs(int64_t n_rows, int64_t run_rows, int64_t per_run) {
  STD_TORCH_CHECK(n_rows > 0 && n_rows < std::numeric_limits<int32_t>::max() && run_rows > 0 && per_run > 0,
                  "there are rows, fewer than 2^31, and experts");
  return (n_rows + run_rows - 1) / run_rows * per_run;
}

// z of a hidden layer and the pieces of its statistics from z of the layer below; see
// fastmtl/backends/triton/hopper.py.
void expert_gate_up(const Tensor& below, const Tensor& stat, const Tensor& weight, int64_t n_experts, int64_t n_below,
                    int64_t n_units, int64_t activation, int64_t run_rows, const Tensor& z, const Tensor& part) {
  const int64_t n_rows = below.size(0), pitch = below.stride(0);
  const int64_t programs = checked_programs(n_rows, run_rows, n_experts);
  checked_units(n_below, kUpBelow, "units below"), checked_units(n_units, kUpUnits, "units");
  Up f{};
  f.below = checked_matrix(below, n_rows, n_experts * n_below, "z below");
  f.weight = checked_matrix(weight, n_experts * n_units, n_below, "the weight");
  f.z = checked_matrix(z, n_rows, n_experts * n_units, "z");
  check_tensor(stat, ScalarType::Float, {4, pitch}, "statistics");
  check_tensor(part, ScalarType::Float, {programs / n_experts, 2, z.stride(0)}, "pieces of statistics");
  f.stat = data<float>(stat), f.part = data<float>(part);
  f.pitch_below = pitch, f.pitch_weight = weight.stride(0), f.pitch = z.stride(0);
  f.n_rows = static_cast<int32_t>(n_rows), f.run_rows = static_cast<int32_t>(std::min(run_rows, n_rows));
  f.n_experts = static_cast<int32_t>(n_experts), f.n_below = static_cast<int32_t>(n_below);
  f.n_units = static_cast<int32_t>(n_units);
  Gpu gpu(below);
  with_activation(activation,
                  [&]<int ACT>() { gpu.run_threads(up_kernel<ACT>, programs, kUpThreads, UpRoom::bytes, f); });
}

// What both ways down are told: dz of a layer, its weight, z of the layer below and its statistics.
Down checked_down(const Tensor& dz, const Tensor& weight, const Tensor& z, const Tensor& stat, int64_t n_experts,
                  int64_t n_units, int64_t n_above, int64_t run_rows) {
  checked_units(n_units, std::numeric_limits<int32_t>::max(), "units");
  checked_units(n_above, kDownAbove, "units above");
  checked_programs(z.size(0), run_rows, n_experts);
  Down f{};
  f.n_rows = static_cast<int32_t>(z.size(0)), f.run_rows = static_cast<int32_t>(std::min(run_rows, z.size(0)));
  f.n_experts = static_cast<int32_t>(n_experts), f.n_units = static_cast<int32_t>(n_units);
  f.n_above = static_cast<int32_t>(n_above);
  f.dz = checked_matrix(dz, z.size(0), n_experts * n_above, "dz above");
  f.weight = checked_matrix(weight, n_experts * n_above, n_units, "the weight");
  f.z = checked_matrix(z, z.size(0), n_experts * n_units, "z");
  f.pitch = z.stride(0), f.pitch_above = dz.stride(0), f.pitch_weight = weight.stride(0);
  check_tensor(stat, ScalarType::Float, {4, f.pitch}, "statistics");
  f.stat = data<float>(stat);
  return f;
}

// The pieces of the sums of D of the layer below; as above.
void expert_gate_down_sums(const Tensor& dz, const Tensor& weight, const Tensor& z, const Tensor& stat,
                           int64_t n_experts, int64_t n_units, int64_t n_above, int64_t activation, int64_t run_rows,
                           const Tensor& part) {
  Down f = checked_down(dz, weight, z, stat, n_experts, n_units, n_above, run_rows);
  const int64_t per_run = n_experts * f.blocks(), programs = checked_programs(f.n_rows, run_rows, per_run);
  check_tensor(part, ScalarType::Float, {programs / per_run, -1, f.pitch}, "pieces of sums");
  STD_TORCH_CHECK(part.size(1) >= 2, "there are two sums");
  f.part = data<float>(part), f.n_sums = static_cast<int32_t>(part.size(1));
  Gpu gpu(z);
  with_activation(activation, [&]<int ACT>() {
    gpu.run_threads(down_sums_kernel<ACT>, programs, kDownThreads, SumsRoom::bytes, f);
  });
}

// dz of the layer below from what its sums have become, and parts of the weight's gradient; as above.
void expert_gate_down(const Tensor& dz, const Tensor& weight, const Tensor& z, const Tensor& stat, const Tensor& coef,
                      int64_t n_experts, int64_t n_units, int64_t n_above, int64_t activation, int64_t run_rows,
                      const Tensor& out, const Tensor& parts) {
  Down f = checked_down(dz, weight, z, stat, n_experts, n_units, n_above, run_rows);
  const int64_t per_run = n_experts * f.blocks(), programs = checked_programs(f.n_rows, run_rows, per_run);
  check_tensor(coef, ScalarType::Float, {2, f.pitch}, "coefficients");
  check_tensor(parts, ScalarType::Float, {programs / per_run, n_experts, n_above, n_units}, "parts of the gradient");
  f.coef = data<float>(coef), f.of_weight = data<float>(parts);
  f.out = checked_matrix(out, f.n_rows, n_experts * n_units, "dz");
  STD_TORCH_CHECK(out.stride(0) == f.pitch, "dz lies as z does");
  Gpu gpu(z);
  with_activation(activation, [&]<int ACT>() {
    gpu.run_threads(down_gradients_kernel<ACT>, programs, kDownThreads, GradientsRoom::bytes, f);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl_cuda, m) {
  m.def("folded(Tensor x, Tensor[] stages, Tensor? is_probability, int activation, Tensor(a!) out) -> ()");
  m.def(
      "expert_gate_up(Tensor below, Tensor stat, Tensor weight, int n_experts, int n_below, int n_units, "
      "int activation, int run_rows, Tensor(a!) z, Tensor(b!) part) -> ()");
  m.def(
      "expert_gate_down_sums(Tensor dz, Tensor weight, Tensor z, Tensor stat, int n_experts, int n_units, int n_above, "
      "int activation, int run_rows, Tensor(a!) part) -> ()");
  m.def(
      "expert_gate_down(Tensor dz, Tensor weight, Tensor z, Tensor stat, Tensor coef, int n_experts, int n_units, "
      "int n_above, int activation, int run_rows, Tensor(a!) out, Tensor(b!) parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl_cuda, CUDA, m) {
  m.impl("folded", FASTMTL_BOX(&folded));
  m.impl("expert_gate_up", FASTMTL_BOX(&expert_gate_up));
  m.impl("expert_gate_down_sums", FASTMTL_BOX(&expert_gate_down_sums));
  m.impl("expert_gate_down", FASTMTL_BOX(&expert_gate_down));
}

}  // namespace fastmtl::cuda
