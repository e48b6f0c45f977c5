// Ops for tests/native alone: the core's products with packed weights on torch tensors, and how fast they are.
#include <algorithm>
#include <chrono>

#include "core/packed_gemm.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {
namespace {

Tensor empty_bf16(int64_t n) {
  return torch::stable::empty({n}, ScalarType::BFloat16, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Bf16* bf16_of(const Tensor& tensor) { return static_cast<Bf16*>(tensor.data_ptr()); }

// c += a w^T where w is [n, k]; by_depth: w is [k, n]. a and w are both float32 or both bfloat16; `bf16` computes the
// product of float32 ones in bf16. Runs it `repeat` times and returns the seconds of the fastest.
double check_packed_gemm(const Tensor& a, const Tensor& w, bool by_depth, bool bf16, Tensor c, bool accumulate,
                         int64_t repeat) {
  const bool given = a.scalar_type() == ScalarType::BFloat16;
  check_cpu(a, given ? ScalarType::BFloat16 : ScalarType::Float, 2, "a");
  check_cpu(w, given ? ScalarType::BFloat16 : ScalarType::Float, 2, "w");
  check_cpu(c, ScalarType::Float, 2, "c");
  const int64_t m = a.size(0), k = a.size(1), n = w.size(by_depth ? 1 : 0);
  STD_TORCH_CHECK(w.size(by_depth ? 0 : 1) == k && c.size(0) == m && c.size(1) == n, "sizes do not match");
  STD_TORCH_CHECK(a.stride(1) == 1 && w.stride(1) == 1 && c.stride(1) == 1, "rows must be dense");
  const PackedGemm& gemm = best_packed_gemm();
  const int64_t ld_a = a.stride(0), ld_w = w.stride(0), ld_c = c.stride(0);
  Tensor packed_f32 = empty_f32({given || bf16 ? 0 : packed_f32_size(n, k)});
  Tensor packed = empty_bf16(packed_bf16_size(n, k)), rounded = empty_bf16(m * k);
  if (given) {
    gemm.repack_bf16(n, k, bf16_of(w), ld_w, by_depth, bf16_of(packed));
  } else if (bf16) {
    gemm.pack_bf16(n, k, w.const_data_ptr<float>(), ld_w, by_depth, bf16_of(packed));
    gemm.round_bf16(m, k, a.const_data_ptr<float>(), ld_a, bf16_of(rounded), k);
  } else {
    gemm.pack_f32(n, k, w.const_data_ptr<float>(), ld_w, by_depth, packed_f32.mutable_data_ptr<float>());
  }
  double best = 1e9;
  for (int64_t i = 0; i < repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    float* to = c.mutable_data_ptr<float>();
    if (given) {
      gemm.gemm_bf16(m, n, k, bf16_of(a), ld_a, bf16_of(packed), to, ld_c, accumulate, nullptr);
    } else if (bf16) {
      gemm.gemm_bf16(m, n, k, bf16_of(rounded), k, bf16_of(packed), to, ld_c, accumulate, nullptr);
    } else {
      gemm.gemm_f32(m, n, k, a.const_data_ptr<float>(), ld_a, packed_f32.const_data_ptr<float>(), to, ld_c, accumulate,
                    nullptr);
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// dw [n, k] += dz^T h of bfloat16 dz [m, n] and h [m, k].
double check_wgrad(const Tensor& dz, const Tensor& h, Tensor dw, bool accumulate, int64_t repeat) {
  check_cpu(dz, ScalarType::BFloat16, 2, "dz");
  check_cpu(h, ScalarType::BFloat16, 2, "h");
  check_cpu(dw, ScalarType::Float, 2, "dw");
  const int64_t m = dz.size(0), n = dz.size(1), k = h.size(1);
  STD_TORCH_CHECK(h.size(0) == m && dw.size(0) == n && dw.size(1) == k, "sizes do not match");
  STD_TORCH_CHECK(dz.stride(1) == 1 && h.stride(1) == 1 && dw.stride(1) == 1, "rows must be dense");
  const Tensor scratch = empty_bf16(wgrad_scratch_size(m, n, k));
  double best = 1e9;
  for (int64_t i = 0; i < repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    best_packed_gemm().wgrad_bf16(m, n, k, bf16_of(dz), dz.stride(0), bf16_of(h), h.stride(0),
                                  dw.mutable_data_ptr<float>(), dw.stride(0), accumulate, bf16_of(scratch), nullptr);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// The same in fp32: dw = dz^T h.
double check_wgrad_f32(const Tensor& dz, const Tensor& h, Tensor dw, bool accumulate, int64_t repeat) {
  check_cpu(dz, ScalarType::Float, 2, "dz");
  check_cpu(h, ScalarType::Float, 2, "h");
  check_cpu(dw, ScalarType::Float, 2, "dw");
  const int64_t m = dz.size(0), n = dz.size(1), k = h.size(1);
  STD_TORCH_CHECK(h.size(0) == m && dw.size(0) == n && dw.size(1) == k, "sizes do not match");
  STD_TORCH_CHECK(dz.stride(1) == 1 && h.stride(1) == 1 && dw.stride(1) == 1, "rows must be dense");
  double best = 1e9;
  for (int64_t i = 0; i < repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    best_packed_gemm().wgrad_f32(m, n, k, dz.const_data_ptr<float>(), dz.stride(0), h.const_data_ptr<float>(),
                                 h.stride(0), dw.mutable_data_ptr<float>(), dw.stride(0), accumulate);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

std::string gemm_isa() { return best_packed_gemm().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "check_packed_gemm(Tensor a, Tensor w, bool by_depth, bool bf16, Tensor(a!) c, bool accumulate, int repeat) -> "
      "float");
  m.def("check_wgrad(Tensor dz, Tensor h, Tensor(a!) dw, bool accumulate, int repeat) -> float");
  m.def("check_wgrad_f32(Tensor dz, Tensor h, Tensor(a!) dw, bool accumulate, int repeat) -> float");
  m.def("gemm_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("check_packed_gemm", FASTMTL_BOX(&check_packed_gemm));
  m.impl("check_wgrad", FASTMTL_BOX(&check_wgrad));
  m.impl("check_wgrad_f32", FASTMTL_BOX(&check_wgrad_f32));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) { m.impl("gemm_isa", FASTMTL_BOX(&gemm_isa)); }

}  // namespace fastmtl::cpu
