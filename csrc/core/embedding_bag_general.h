// embedding_bag with everything that the common lookup does not have: max pooling, a weight for each id, ragged bags,
// and tables in 16 bits. embedding_bag.h and embedding_bag_sparse.h keep the common case free of its cost.
//
// Layout      as in embedding_bag.h; a ragged bag reads no id columns but, in row b of the batch, the ids
//             [offsets[b], offsets[b + 1]) of a list. An id is known by its entry: b * S + column, or B * S + its place
//             in the list.
// Threading   none in here: the caller splits the rows of the batch, the units of an index, or the rows of the values.
// Accumulation fp32, in the order of the batch; of a row of a table in 16 bits each number is widened first.
// Determinism each result is computed by one thread in the order of the batch: the same for every number of threads.
//             The maximum of several equal numbers is the first of them, and it alone has a gradient.
// Aliasing    outputs must not overlap inputs.
// Bounds      no id is used before it was compared with its vocabulary, no entry before it was compared with their
// number.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "core/embedding_bag_sparse.h"

namespace fastmtl {

enum class Width { kF32, kBf16, kF16 };

inline float widen_bf16(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
inline float widen_f16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13, sign = static_cast<uint32_t>(x & 0x8000) << 16;
  // 2^112 is the ratio of the two exponents' biases: right for subnormal numbers too
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(bits | sign);
}

// A weight tensor, row-major.
struct AnyTable {
  const void* data;
  Width width;
  int64_t dim;

  // A row as floats: where it lies, or in `buffer`.
  const float* row(int64_t row, float* buffer) const {
    if (width == Width::kF32) return static_cast<const float*>(data) + row * dim;
    const uint16_t* from = static_cast<const uint16_t*>(data) + row * dim;
    if (width == Width::kBf16) {
      for (int64_t d = 0; d < dim; ++d) buffer[d] = widen_bf16(from[d]);
    } else {
      for (int64_t d = 0; d < dim; ++d) buffer[d] = widen_f16(from[d]);
    }
    return buffer;
  }
  void prefetch(int64_t row) const {
    __builtin_prefetch(static_cast<const char*>(data) + row * dim * (width == Width::kF32 ? 4 : 2));
  }
};

// Numbers of 32 or 64 bits.
struct AnyIds {
  const void* data;
  bool wide;
  int64_t operator[](int64_t at) const {
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// A batch's ids, in columns and in a list.
struct GeneralIds {
  const Bag* bags;
  int64_t n_bags;
  const int64_t* ragged;  // [F]: which ragged bag, -1: one of columns
  int64_t n_rows, n_columns;
  AnyIds ids;
  int64_t row_stride, column_stride;
  const float* scales;  // [B, S], null: all one
  int64_t scale_row, scale_column;
  AnyIds list;
  int64_t n_list;
  const int64_t* offsets;    // [R, B + 1]
  const float* list_scales;  // [N], null: all one

  int64_t start(int64_t f, int64_t b) const { return offsets[ragged[f] * (n_rows + 1) + b]; }
  int64_t length(int64_t f, int64_t b) const { return ragged[f] < 0 ? bags[f].length : start(f, b + 1) - start(f, b); }
  int64_t id(int64_t f, int64_t b, int64_t l) const {
    return ragged[f] < 0 ? ids[b * row_stride + (bags[f].column + l) * column_stride] : list[start(f, b) + l];
  }
  float scale(int64_t f, int64_t b, int64_t l) const {
    if (ragged[f] >= 0) return list_scales ? list_scales[start(f, b) + l] : 1.0f;
    return scales ? scales[b * scale_row + (bags[f].column + l) * scale_column] : 1.0f;
  }
  int64_t entry(int64_t f, int64_t b, int64_t l) const {
    return ragged[f] < 0 ? b * n_columns + bags[f].column + l : n_rows * n_columns + start(f, b) + l;
  }
  int64_t row(int64_t f, int64_t b, int64_t l) const {
    const int64_t found = resolve(bags[f], id(f, b, l));
    return found < 0 ? found : found + bags[f].offset;
  }
  // What a mean divides by.
  float count(int64_t f, int64_t b) const {
    int64_t counted = 0;
    for (int64_t l = 0; l < length(f, b); ++l) counted += row(f, b, l) >= 0;
    return static_cast<float>(std::max<int64_t>(counted, 1));
  }
};

// Rows [begin, end) of the output, without the dense columns. Refused ids give zeros and are noted in `bad`. `winners`
// holds for each bag null or [B, D]: which of its ids has the maximum, -1: none. `out` may be null: only the winners.
inline void general_fwd(const GeneralIds& from, const AnyTable* tables, int64_t begin, int64_t end, float* out,
                        int64_t width, int32_t* const* winners, BadId& bad) {
  int64_t widest = 0;
  for (int64_t f = 0; f < from.n_bags; ++f) widest = std::max(widest, from.bags[f].dim);
  std::vector<float> buffer(static_cast<size_t>(widest)), best(static_cast<size_t>(widest));
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t f = 0; f < from.n_bags; ++f) {
      const Bag& bag = from.bags[f];
      const AnyTable& table = tables[bag.table];
      const bool is_max = bag.pooling == kMax;
      if (out == nullptr && !is_max) continue;
      const int64_t length = from.length(f, b);
      float* to = is_max ? best.data() : out + b * width + bag.out;
      int32_t* winner = winners && winners[f] ? winners[f] + b * bag.dim : nullptr;
      std::fill_n(to, bag.dim * (bag.pooling == kConcat ? length : 1), 0.0f);
      if (winner) std::fill_n(winner, bag.dim, -1);
      if (b + 2 < end) {  // near rows of the batch are asked for while this one is pooled
        const int64_t ahead = std::min<int64_t>(from.length(f, b + 2), kPrefetch);
        for (int64_t l = 0; l < ahead; ++l) {
          const int64_t row = from.row(f, b + 2, l);
          if (row >= 0) table.prefetch(row);
        }
      }
      int64_t counted = 0;
      for (int64_t l = 0; l < length; ++l) {
        const int64_t row = from.row(f, b, l);
        if (row == kRefused) bad.note({f, b, l, from.id(f, b, l)});
        if (row < 0) continue;
        const float* x = table.row(row, buffer.data());
        const float scale = from.scale(f, b, l);
        if (is_max) {
          for (int64_t d = 0; d < bag.dim; ++d) {
            if (counted > 0 && !(x[d] > to[d])) continue;
            to[d] = x[d];
            if (winner) winner[d] = static_cast<int32_t>(l);
          }
        } else {
          float* sum = to + (bag.pooling == kConcat ? l * bag.dim : 0);
#pragma omp simd
          for (int64_t d = 0; d < bag.dim; ++d) sum[d] += scale * x[d];
        }
        ++counted;
      }
      if (bag.pooling == kMean && counted > 1) {
        const float count = static_cast<float>(counted);
#pragma omp simd
        for (int64_t d = 0; d < bag.dim; ++d) to[d] /= count;
      }
      if (is_max && out) std::memcpy(out + b * width + bag.out, to, sizeof(float) * static_cast<size_t>(bag.dim));
    }
  }
}

// As index_unit in embedding_bag_sparse.h.
inline UnitIndex general_index(const Unit& unit, const GeneralIds& from) {
  std::vector<uint64_t> keys, spare;
  for (int64_t b = 0; b < from.n_rows; ++b) {
    for (int64_t f : unit.bags) {
      const int64_t length = from.length(f, b);
      for (int64_t l = 0; l < length; ++l) {
        const int64_t row = from.row(f, b, l);
        if (row < unit.begin || row >= unit.end) continue;
        keys.push_back(static_cast<uint64_t>(row - unit.begin) << 32 | static_cast<uint64_t>(from.entry(f, b, l)));
      }
    }
  }
  detail::sort_by_row(keys, spare, static_cast<uint64_t>(unit.end - unit.begin));
  return collect_rows(keys, unit.begin);
}

// Where an entry stands: bag, row of the batch, place in the bag.
struct Place {
  int64_t bag, row, at;
};

// What the gradients need beside the ids.
struct GeneralGrad {
  const GeneralIds& from;
  const int64_t* bag_of;    // [S] bag of an id column, -1: none
  const int32_t* list_row;  // [N] row of the batch
  const int32_t* list_bag;  // [N] bag, -1: none
  const float* grad;        // [B, W], row stride `stride`
  int64_t stride;
  const float* const* counts;  // for each bag null, or [B]: what a mean divides by
  int32_t* const* winners;     // for each bag null, or [B, D]

  Place place(int64_t entry) const {
    const int64_t fixed = from.n_rows * from.n_columns;
    if (entry < 0 || entry >= fixed + from.n_list) return {-1, 0, 0};
    if (entry < fixed) {
      const int64_t b = entry / from.n_columns, column = entry % from.n_columns, f = bag_of[column];
      return {f, b, f < 0 ? 0 : column - from.bags[f].column};
    }
    const int64_t at = entry - fixed, f = list_bag[at];
    return {f, list_row[at], f < 0 ? 0 : at - from.start(f, list_row[at])};
  }
  const float* of(const Place& p) const {
    const Bag& bag = from.bags[p.bag];
    return grad + p.row * stride + bag.out + (bag.pooling == kConcat ? p.at * bag.dim : 0);
  }
};

// Rows [begin, end) of the values [n, dim] of one weight, by its index.
inline void general_values(const GeneralGrad& g, int64_t dim, const int64_t* starts, const int32_t* entries,
                           int64_t begin, int64_t end, float* values) {
  for (int64_t i = begin; i < end; ++i) {
    float* to = values + i * dim;
    std::fill_n(to, dim, 0.0f);  // dim may be 0, and to a null pointer then
    for (int64_t k = starts[i]; k < starts[i + 1]; ++k) {
      const Place place = g.place(entries[k]);
      if (place.bag < 0 || g.from.bags[place.bag].dim != dim) continue;
      const float* grad = g.of(place);
      if (const int32_t* winner = g.winners[place.bag]) {
        winner += place.row * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] += winner[d] == place.at ? grad[d] : 0.0f;
        continue;
      }
      const float scale = g.from.scale(place.bag, place.row, place.at);
      const float count = g.counts[place.bag] ? g.counts[place.bag][place.row] : 1.0f;
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) to[d] += scale * grad[d] / count;
    }
  }
}

// The gradients of the ids' own weights, for rows [begin, end) of the batch: <gradient, row of the table> / count.
inline void general_scale_grad(const GeneralGrad& g, const AnyTable* tables, int64_t begin, int64_t end, float* dscales,
                               float* dlist) {
  std::vector<float> buffer;
  for (int64_t f = 0; f < g.from.n_bags; ++f) {
    const Bag& bag = g.from.bags[f];
    buffer.resize(static_cast<size_t>(bag.dim));
    float* to = g.from.ragged[f] < 0 ? dscales : dlist;
    if (to == nullptr || bag.pooling == kMax) continue;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t length = g.from.length(f, b);
      for (int64_t l = 0; l < length; ++l) {
        const int64_t row = g.from.row(f, b, l);
        if (row < 0) continue;
        const float *x = tables[bag.table].row(row, buffer.data()), *grad = g.of({f, b, l});
        float sum = 0;
        for (int64_t d = 0; d < bag.dim; ++d) sum += grad[d] * x[d];
        const int64_t entry = g.from.entry(f, b, l);
        to[g.from.ragged[f] < 0 ? entry : entry - g.from.n_rows * g.from.n_columns] =
            sum / (g.counts[f] ? g.counts[f][b] : 1.0f);
      }
    }
  }
}

}  // namespace fastmtl
