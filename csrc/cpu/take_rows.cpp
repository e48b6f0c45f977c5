// Rows of several tensors at once, on torch tensors: check, allocate, run. See core/take_rows.h.
#include "core/take_rows.h"

#include "cpu/tensors.h"

namespace fastmtl::cpu {
namespace {

// For each block [N, ...], contiguous, its rows [B, ...].
std::vector<Tensor> take_rows(std::vector<Tensor> blocks, const Tensor& rows) {
  check_cpu(rows, ScalarType::Long, 1, "rows");
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  const int64_t n = rows.size(0);
  const int64_t* numbers = rows.const_data_ptr<int64_t>();
  int64_t least = 0, most = -1;
  for (int64_t i = 0; i < n; ++i) {
    least = std::min(least, numbers[i]);
    most = std::max(most, numbers[i]);
  }
  std::vector<Tensor> results;
  for (const Tensor& block : blocks) {
    STD_TORCH_CHECK(block.is_cpu() && block.is_contiguous() && block.dim() > 0,
                    "blocks must be contiguous, on the CPU, and have rows");
    STD_TORCH_CHECK(least >= 0 && most < block.size(0), "row ", least < 0 ? least : most, " of ", block.size(0));
    std::vector<int64_t> sizes{n};
    int64_t row_bytes = static_cast<int64_t>(block.element_size());
    for (int64_t d = 1; d < block.dim(); ++d) {
      sizes.push_back(block.size(d));
      row_bytes *= block.size(d);
    }
    Tensor result = torch::stable::new_empty(block, sizes);
    fastmtl::take_rows(static_cast<const char*>(block.const_data_ptr()), row_bytes, numbers, n,
                       static_cast<char*>(result.mutable_data_ptr()));
    results.push_back(result);
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) { m.def("take_rows(Tensor[] blocks, Tensor rows) -> Tensor[]"); }

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("take_rows", FASTMTL_BOX(&take_rows)); }

}  // namespace fastmtl::cpu
