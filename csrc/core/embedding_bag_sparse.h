// The sparse form of embedding_bag's backward: for each weight the rows that a batch looked up, and their gradients.
//
// Layout      an index of a weight is rows [n] ascending, starts [n + 1] and entries: row rows[i] was looked up by the
//             entries [starts[i], starts[i + 1]), each the number b * S + column of an id. values is [n, dim].
// Threading   none in here: the caller deals the units of `plan_bwd` (index) or ranges of rows (values).
// Accumulation fp32, over the entries of a row in the order of the batch, as the dense form adds them.
// Determinism a row is summed by one thread in the order of the batch: the same result for every number of threads, and
//             bit for bit the dense form's.
// Aliasing    outputs must not overlap inputs.
// Bounds      rows come from ids that `resolve` let pass; entries are compared with B * S before they are used.
#pragma once

#include <bit>
#include <vector>

#include "core/embedding_bag.h"

namespace fastmtl {

// What one unit found: its rows (of the weight), where each one's entries begin, the entries.
struct UnitIndex {
  std::vector<int64_t> rows, starts;
  std::vector<int32_t> entries;
};

namespace detail {

// Sorts keys by their upper halves, which are below `span`; equal ones keep their order. `spare` is scratch memory.
inline void sort_by_row(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare, uint64_t span) {
  constexpr int kDigit = 11;
  const int bits = std::bit_width(span > 0 ? span - 1 : 0);
  const int passes = (bits + kDigit - 1) / kDigit;
  spare.resize(keys.size());
  int64_t counts[1 << kDigit];
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * kDigit;
    constexpr uint64_t kMask = (1 << kDigit) - 1;
    std::fill(std::begin(counts), std::end(counts), 0);
    for (uint64_t key : keys) ++counts[key >> shift & kMask];
    int64_t at = 0;
    for (int64_t& count : counts) {
      const int64_t here = count;
      count = at;
      at += here;
    }
    for (uint64_t key : keys) spare[static_cast<size_t>(counts[key >> shift & kMask]++)] = key;
    keys.swap(spare);
  }
}

}  // namespace detail

// An index from sorted keys: the row behind `begin` in the upper half, the entry in the lower one.
inline UnitIndex collect_rows(const std::vector<uint64_t>& keys, int64_t begin) {
  UnitIndex index;
  index.entries.reserve(keys.size());
  for (uint64_t key : keys) {
    const int64_t row = begin + static_cast<int64_t>(key >> 32);
    if (index.rows.empty() || index.rows.back() != row) {
      index.rows.push_back(row);
      index.starts.push_back(static_cast<int64_t>(index.entries.size()));
    }
    index.entries.push_back(static_cast<int32_t>(key & 0x7fffffff));
  }
  return index;
}

// The lookups of a unit, which must have fewer than 2^32 rows, in a batch of fewer than 2^31 ids.
template <class Id>
UnitIndex index_unit(const Unit& unit, const Bag* bags, const Ids<Id>& ids, int64_t n_rows, int64_t n_columns) {
  std::vector<uint64_t> keys, spare;
  int64_t length = 0;
  for (int64_t f : unit.bags) length += bags[f].length;
  keys.reserve(static_cast<size_t>(n_rows * length));
  for (int64_t b = 0; b < n_rows; ++b) {
    for (int64_t f : unit.bags) {
      const Bag& bag = bags[f];
      for (int64_t column = bag.column; column < bag.column + bag.length; ++column) {
        const int64_t found = resolve(bag, ids(b, column));
        const int64_t row = found + bag.offset;
        if (found < 0 || row < unit.begin || row >= unit.end) continue;
        keys.push_back(static_cast<uint64_t>(row - unit.begin) << 32 | static_cast<uint64_t>(b * n_columns + column));
      }
    }
  }
  detail::sort_by_row(keys, spare, static_cast<uint64_t>(unit.end - unit.begin));
  return collect_rows(keys, unit.begin);
}

// What the values of all rows need to know of the batch.
struct SparseGrad {
  const Bag* bags;
  const int64_t* bag_of;  // [S] bag of an id column
  int64_t n_rows, n_columns;
  const float* grad;  // [B, W], row stride `stride`
  int64_t stride;
  const float* const* counts;  // for each bag null, or [B]: what a mean divides by
};

// [B]: how many ids of a mean-pooled bag counted, and a little more, as in the forward.
template <class Id>
void count_bag(const Bag& bag, const Ids<Id>& ids, int64_t n_rows, float* counts) {
  for (int64_t b = 0; b < n_rows; ++b) {
    int64_t counted = 0;
    for (int64_t l = 0; l < bag.length; ++l) counted += resolve(bag, ids(b, bag.column + l)) >= 0;
    counts[b] = static_cast<float>(counted) + kMeanEpsilon;
  }
}

namespace detail {

template <int D>
void sum_rows(const SparseGrad& from, int64_t dim_given, const int64_t* starts, const int32_t* entries, int64_t begin,
              int64_t end, float* values) {
  const int64_t dim = D ? D : dim_given;
  const int64_t n_ids = from.n_rows * from.n_columns;
  for (int64_t i = begin; i < end; ++i) {
    float* to = values + i * dim;
    std::fill_n(to, dim, 0.0f);
    for (int64_t k = starts[i]; k < starts[i + 1]; ++k) {
      const int64_t entry = entries[k];
      if (entry < 0 || entry >= n_ids) continue;
      const int64_t b = entry / from.n_columns, column = entry % from.n_columns;
      const int64_t f = from.bag_of[column];
      if (f < 0 || from.bags[f].dim != dim) continue;
      const Bag& bag = from.bags[f];
      const float* grad = from.grad + b * from.stride + bag.out;
      if (bag.pooling == kConcat) grad += (column - bag.column) * dim;
      if (from.counts[f] != nullptr) {
        const float count = from.counts[f][b];
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) to[d] += grad[d] / count;
      } else {
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) to[d] += grad[d];
      }
    }
  }
}

}  // namespace detail

// Rows [begin, end) of the values [n, dim] of one weight, by its index.
inline void embedding_bag_values(const SparseGrad& from, int64_t dim, const int64_t* starts, const int32_t* entries,
                                 int64_t begin, int64_t end, float* values) {
  switch (dim) {
    case 4:
      return detail::sum_rows<4>(from, dim, starts, entries, begin, end, values);
    case 8:
      return detail::sum_rows<8>(from, dim, starts, entries, begin, end, values);
    case 16:
      return detail::sum_rows<16>(from, dim, starts, entries, begin, end, values);
    case 32:
      return detail::sum_rows<32>(from, dim, starts, entries, begin, end, values);
    default:
      return detail::sum_rows<0>(from, dim, starts, entries, begin, end, values);
  }
}

}  // namespace fastmtl
