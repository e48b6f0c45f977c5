// Runs the folded layer's kernel on the CPU: arrays and numbers as its struct Folded names them.
#include <algorithm>
#include <memory>

#include "arrays.h"
#include "hopper_on_cpu.h"

// what the kernel finds: it must come before
static_assert(sizeof(uint4) == 16);

#include "cuda/folded.cuh"

int main(int argc, char** argv) {
  using namespace fastmtl::cuda;
  if (!read_arguments(argc, argv)) return 2;
  static_assert(FoldedRoom::bytes <= emulated::kSharedBytes);
  const auto x = read<uint4>("x"), stages = read<uint4>("stages");
  const auto biases = read<uint4>("biases");
  const auto gate_bias = read<float>("gate_bias"), tower_bias1 = read<float>("tower_bias1"),
             tower_bias2 = read<float>("tower_bias2"), head = read<float>("head"), head_bias = read<float>("head_bias");
  const auto gate_columns = read<int32_t>("gate_columns"), members = read<int32_t>("members");
  const auto binary = read<unsigned char>("is_probability");
  auto out = read<float>("out");
  const auto n_experts = static_cast<int32_t>(number("n_experts"));
  const auto programs = static_cast<unsigned>(number("programs"));
  std::vector<uint4> left(size_t{programs} * static_cast<size_t>(n_experts) * 2 * 8 * kWarpgroup,
                          uint4{~0u, ~0u, ~0u, ~0u});
  const auto is_probability = std::make_unique<bool[]>(binary.size());
  std::transform(binary.begin(), binary.end(), is_probability.get(), [](unsigned char one) { return one != 0; });
  Folded f{};
  f.x = reinterpret_cast<const char*>(x.data()) + number("offset");
  f.row_bytes = number("row_bytes");
  f.n_rows = static_cast<int32_t>(number("n_rows"));
  f.n_in = static_cast<int32_t>(number("n_in"));
  f.stages = reinterpret_cast<const unsigned char*>(stages.data());
  f.biases = reinterpret_cast<const unsigned char*>(biases.data());
  f.n_experts = n_experts;
  f.n_gates = static_cast<int32_t>(gate_columns.size()) - 1;
  f.gate_bias = gate_bias.data();
  f.gate_columns = gate_columns.data();
  f.members = members.data();
  f.left = left.data();
  f.tower_bias1 = tower_bias1.data();
  f.tower_bias2 = tower_bias2.data();
  f.head = head.data();
  f.head_bias = head_bias.data();
  f.is_probability = binary.empty() ? nullptr : is_probability.get();
  f.out = out.data();
  if (static_cast<int64_t>(stages.size()) * 16 != int64_t{f.of_tile()} * kStageBytes) return 3;
  const int n_tiles = (f.n_rows + kProgramRows - 1) / kProgramRows;
  emulated::forget();
  void (*const kernels[])(const Folded, int32_t) = {folded_kernel<kRelu>, folded_kernel<kLeakyRelu>,
                                                    folded_kernel<kSilu>};
  emulated::run(kernels[number("activation")], programs, kFoldedThreads, f, n_tiles);
  write("out", out);
  return 0;
}
