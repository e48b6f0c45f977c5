// A shuffle in pieces on torch tensors: check, run. What it means is in core/shuffle.h.
#include "core/shuffle.h"

#include "cpu/tensors.h"

namespace fastmtl::cpu {
namespace {

void shuffle_ahead(Tensor order, int64_t begin, const Tensor& draws) {
  const bool narrow = order.scalar_type() == ScalarType::Int;
  check_cpu(order, narrow ? ScalarType::Int : ScalarType::Long, 1, "order");
  check_cpu(draws, ScalarType::Long, 1, "draws");
  STD_TORCH_CHECK(order.is_contiguous() && draws.is_contiguous(), "order and draws must be contiguous");
  const int64_t n = order.size(0), count = draws.size(0);
  STD_TORCH_CHECK(n <= UINT32_MAX, "an order of ", n, " entries is longer than draws of 32 bits reach");
  STD_TORCH_CHECK(begin >= 0 && begin <= n && count <= n - begin, "there are no ", count, " steps from ", begin,
                  " on in an order of ", n);
  const int64_t* drawn = draws.const_data_ptr<int64_t>();
  if (narrow) {
    fastmtl::shuffle_ahead(order.mutable_data_ptr<int32_t>(), n, begin, drawn, count);
  } else {
    fastmtl::shuffle_ahead(order.mutable_data_ptr<int64_t>(), n, begin, drawn, count);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) { m.def("shuffle_ahead(Tensor(a!) order, int begin, Tensor draws) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("shuffle_ahead", FASTMTL_BOX(&shuffle_ahead)); }

}  // namespace fastmtl::cpu
