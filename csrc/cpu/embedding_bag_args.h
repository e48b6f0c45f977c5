// A lookup as torch hands it over: its plan and its ids.
#pragma once

#include "core/embedding_bag.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {

// The plan [F, kBagFields] as bags, checked against the tensors it will index, so that no plan can make a kernel read
// or write out of bounds.
inline const Bag* checked_bags(const Tensor& plan, const std::vector<int64_t>& rows, const std::vector<int64_t>& dims,
                               int64_t id_columns, int64_t width) {
  check_cpu(plan, ScalarType::Long, 2, "plan");
  STD_TORCH_CHECK(plan.is_contiguous() && plan.size(1) == kBagFields, "plan must be [F, ", kBagFields, "] contiguous");
  STD_TORCH_CHECK(width >= 0, "the output must have at least 0 columns, not ", width);
  const Bag* bags = reinterpret_cast<const Bag*>(plan.const_data_ptr<int64_t>());
  for (int64_t f = 0; f < plan.size(0); ++f) {
    const Bag& bag = bags[f];
    STD_TORCH_CHECK(bag.table >= 0 && bag.table < static_cast<int64_t>(rows.size()), "bag ", f, " names no weight");
    STD_TORCH_CHECK(bag.dim == dims[bag.table], "bag ", f, " has width ", bag.dim, ", its weight ", dims[bag.table]);
    STD_TORCH_CHECK(bag.offset >= 0 && bag.vocab >= 0 && bag.offset <= rows[bag.table] - bag.vocab, "bag ", f,
                    " ends behind its weight of ", rows[bag.table], " rows");
    STD_TORCH_CHECK(bag.column >= 0 && bag.length >= 0 && bag.column <= id_columns - bag.length, "bag ", f,
                    " ends behind the ", id_columns, " id columns");
    const int64_t parts = bag.pooling == kConcat ? bag.length : 1;  // a product could overflow
    STD_TORCH_CHECK(
        bag.dim >= 0 && bag.out >= 0 && bag.out <= width && (parts == 0 || bag.dim <= (width - bag.out) / parts),
        "bag ", f, " ends behind the output's ", width, " columns");
    STD_TORCH_CHECK(bag.oov >= kRaise && bag.oov < bag.vocab, "bag ", f, " replaces unknown ids by a row it lacks");
  }
  return bags;
}

// The common backward knows no maximum: that needs the tables.
inline const Bag* without_max(const Bag* bags, int64_t n_bags) {
  for (int64_t f = 0; f < n_bags; ++f) {
    STD_TORCH_CHECK(bags[f].pooling >= kSum && bags[f].pooling <= kConcat, "bag ", f, " has no pooling of this op");
  }
  return bags;
}

// Calls f with the ids as Ids<int32_t> or Ids<int64_t>.
template <class F>
void with_ids(const Tensor& ids, F&& f) {
  if (ids.scalar_type() == ScalarType::Int) {
    f(Ids<int32_t>{ids.const_data_ptr<int32_t>(), ids.stride(0), ids.stride(1)});
  } else {
    f(Ids<int64_t>{ids.const_data_ptr<int64_t>(), ids.stride(0), ids.stride(1)});
  }
}

inline void check_ids(const Tensor& ids) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.dim() == 2, "ids must be [B, S] on the CPU");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "ids must be int64 or int32");
}

}  // namespace fastmtl::cpu
