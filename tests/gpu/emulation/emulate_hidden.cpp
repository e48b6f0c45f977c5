// Runs the kernels between two hidden layers (csrc/cuda/up.cuh, down.cuh) on the CPU: arrays and
// numbers as their structs name them.
#include <algorithm>

#include "arrays.h"
#include "hopper_on_cpu.h"

// what the kernels find: it must come before
static_assert(sizeof(uint4) == 16);

#include "cuda/down.cuh"
#include "cuda/up.cuh"

namespace {

using namespace fastmtl::cuda;

std::vector<uint4> matrix(const char* name) { return read<uint4>(name); }
char* bytes(std::vector<uint4>& of) { return reinterpret_cast<char*>(of.data()); }
int32_t small(const char* name) { return static_cast<int32_t>(number(name)); }

unsigned programs(int32_t n_experts, int32_t blocks, int32_t n_rows, int32_t run_rows) {
  return static_cast<unsigned>(n_experts * blocks * ((n_rows + run_rows - 1) / run_rows));
}

template <int ACT>
void up() {
  auto below = matrix("below"), weight = matrix("weight"), z = matrix("z");
  const auto stat = read<float>("stat");
  auto part = read<float>("part");
  Up f{};
  f.below = bytes(below), f.stat = stat.data(), f.weight = bytes(weight), f.z = bytes(z);
  f.part = part.data();
  f.pitch_below = number("pitch_below"), f.pitch_weight = number("pitch_weight"), f.pitch = number("pitch");
  f.n_rows = small("n_rows"), f.run_rows = small("run_rows"), f.n_experts = small("n_experts");
  f.n_below = small("n_below"), f.n_units = small("n_units");
  emulated::forget();
  emulated::run(up_kernel<ACT>, programs(f.n_experts, 1, f.n_rows, f.run_rows), kUpThreads, f);
  write("z", z), write("part", part);
}

template <int ACT, bool SUM>
void down() {
  auto dz = matrix("dz"), weight = matrix("weight"), z = matrix("z"), out = matrix("out");
  const auto stat = read<float>("stat"), coef = read<float>("coef");
  auto part = read<float>("part"), parts = read<float>("parts");
  Down f{};
  f.dz = bytes(dz), f.weight = bytes(weight), f.z = bytes(z), f.stat = stat.data(), f.coef = coef.data();
  f.part = part.data(), f.out = bytes(out), f.of_weight = parts.data();
  f.pitch = number("pitch"), f.pitch_above = number("pitch_above"), f.pitch_weight = number("pitch_weight");
  f.n_rows = small("n_rows"), f.run_rows = small("run_rows"), f.n_experts = small("n_experts");
  f.n_units = small("n_units"), f.n_above = small("n_above"), f.n_sums = small("n_sums");
  emulated::forget();
  emulated::run(SUM ? down_sums_kernel<ACT> : down_gradients_kernel<ACT>,
                programs(f.n_experts, f.blocks(), f.n_rows, f.run_rows), kDownThreads, f);
  write("part", part), write("out", out), write("parts", parts);
}

template <int ACT>
void run() {
  if (number("kernel") == 0) return up<ACT>();
  number("kernel") == 1 ? down<ACT, true>() : down<ACT, false>();
}

}  // namespace

int main(int argc, char** argv) {
  if (!read_arguments(argc, argv)) return 2;
  static_assert(UpRoom::bytes <= emulated::kSharedBytes && SumsRoom::bytes <= emulated::kSharedBytes &&
                GradientsRoom::bytes <= emulated::kSharedBytes);
  void (*const with[])() = {run<kRelu>, run<kLeakyRelu>, run<kSilu>};
  with[number("activation")]();
  return 0;
}
