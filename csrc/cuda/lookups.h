// What the kernels are told about a lookup and about the table it reads: plain structures of device pointers.
#pragma once

#include <cstdint>

#include "cuda/rules.h"

namespace fastmtl::cuda {

// One bag of a weight, as fastmtl/backends/triton/embedding_plan.py lays it out.
struct BagPlan {
  int64_t first, length;  // its id columns
  int64_t vocab, offset;  // its table's rows, and where they begin in the weight
  int64_t mean;
  int64_t n_pads, pad0, pad1;
  int64_t oov;           // a row of the table, or negative: counts as nothing
  int64_t out;           // first output column
  int64_t tiny, column;  // whether its table is summed without a sort; its first column among those of its kind
};
constexpr int64_t kBagPlanFields = sizeof(BagPlan) / sizeof(int64_t);

// The row in the weight that an id reads, or -1: none. An id is never used before this.
FASTMTL_BOTH int64_t row_of(const BagPlan& bag, int64_t id) {
  if (bag.n_pads > 0 && (id == bag.pad0 || (bag.n_pads > 1 && id == bag.pad1))) return -1;
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(bag.vocab)) return id;
  return bag.oov >= 0 && bag.oov < bag.vocab ? bag.oov : -1;
}

// ids[b, c], 32 or 64 bits.
struct IdView {
  const void* data;
  int64_t row_stride, column_stride;
  bool wide;
  FASTMTL_BOTH int64_t operator()(int64_t b, int64_t c) const {
    const int64_t at = b * row_stride + c * column_stride;
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// The gradient of the output [B, W], in float32 or bfloat16.
struct Gradient {
  const void* data;
  int64_t stride;  // elements from row to row
  bool half;       // bfloat16
};

// Sorted lookups. Rows are 32 bits wide: more of them would not fit on a device.
struct Lookups {
  const uint32_t* keys;  // [n] rows in the weight, ascending; void_row where a lookup counts as nothing
  const int32_t* order;  // [n] place of each in [B, n_columns]
  Gradient grad;
  const int32_t* columns;  // [n_columns, 2] output column, bag
  const float* counted;    // [B, n_bags] what a bag's gradient is divided by; read where `mean`
  int64_t n;
  uint32_t void_row;
  int32_t n_columns, n_bags;
  bool mean;
};

// Where a row's finished gradient goes: into `out`, or into the optimizer's step of the table.
struct Target {
  float* out;     // [V_total, dim], or [n, dim] in the order of the rows where `rows` is given
  int64_t* rows;  // [n], or null
  float *p, *first, *second;
  int32_t* last;
  const Step* step;
  const int32_t* now;  // the step's number; negative: nothing is to move after all
  int64_t dim;
};

// A bfloat16.
FASTMTL_BOTH float widen(uint16_t bits) {
  union {
    uint32_t u;
    float f;
  } both = {static_cast<uint32_t>(bits) << 16};
  return both.f;
}

}  // namespace fastmtl::cuda
