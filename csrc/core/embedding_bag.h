// embedding_bag: every feature of a model looked up, pooled and laid side by side in one pass over the batch.
//
// Layout      weights[t] is row-major [rows_t, dim_t]: the tables of all features of one width, one below the other.
//             ids is [B, S] with any strides, 32 or 64 bits; bag f owns the columns [column, column + length).
//             out is row-major [B, width]: the bags in order, then the dense columns.
// Threading   none in here: the caller splits the rows (forward) or the units of `plan_bwd` (backward).
// Accumulation fp32, over the columns of a bag in order (forward), over the rows of the batch in order (backward).
// Determinism each row of out, and each row of a gradient, is computed by one thread in the order of the batch: the
//             result is the same for every number of threads.
// Aliasing    outputs must not overlap inputs.
// Bounds      no id is used before it was compared with its vocabulary; the first refused one is reported, not
// followed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastmtl {

enum Pooling : int64_t { kSum = 0, kMean = 1, kConcat = 2, kMax = 3 };  // kMax backward: embedding_bag_general.h

// What to do with an id outside the vocabulary; any other value is the row that stands for it.
enum Oov : int64_t { kRaise = -2, kZero = -1 };

// One bag, as the rows of the plan tensor hold it (all int64, in this order).
struct Bag {
  int64_t table;    // weight tensor that holds the feature's table
  int64_t offset;   // first row of the table in it
  int64_t vocab;    // rows of the table
  int64_t dim;      // D
  int64_t pooling;  // Pooling
  int64_t column;   // first id column
  int64_t length;   // id columns L
  int64_t out;      // first output column
  int64_t n_pad;    // how many of pad0, pad1 are in use
  int64_t pad0, pad1;
  int64_t oov;  // Oov, or a row of the table
};
constexpr int64_t kBagFields = sizeof(Bag) / sizeof(int64_t);

// torch-rechub divides a mean-pooled bag by count + this; only an empty bag notices.
constexpr float kMeanEpsilon = 1e-16f;

template <class Id>
struct Ids {
  const Id* data;
  int64_t row_stride, column_stride;
  int64_t operator()(int64_t row, int64_t column) const {
    return static_cast<int64_t>(data[row * row_stride + column * column_stride]);
  }
};

// The refused id that comes first: bags in order, in a bag rows in order, in a row columns in order.
struct BadId {
  int64_t bag = -1, row = -1, column = -1, id = 0;
  void note(const BadId& other) {
    if (other.bag < 0) return;
    const bool first = bag < 0 || other.bag < bag ||
                       (other.bag == bag && (other.row < row || (other.row == row && other.column < column)));
    if (first) *this = other;
  }
};

constexpr int64_t kSkip = -1;     // adds nothing: padding, or an unknown id that is replaced by zero
constexpr int64_t kRefused = -2;  // an unknown id of a bag that refuses them

// Row of the table for an id, kSkip or kRefused.
inline int64_t resolve(const Bag& bag, int64_t id) {
  if (bag.n_pad > 0 && (id == bag.pad0 || (bag.n_pad > 1 && id == bag.pad1))) return kSkip;
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(bag.vocab)) return id;
  return bag.oov;
}

// How many rows ahead a gathered or scattered row is asked for: the tables do not fit into any cache.
constexpr int64_t kPrefetch = 12;

namespace detail {

// A row of a table. Widths of a few numbers take less time in fours, the last of which overlap, than a call does.
template <int D>
inline void copy_row(const float* from, float* to, int64_t dim) {
  if (D || dim < 4 || dim > 32) {
    std::memcpy(to, from, sizeof(float) * (D ? D : dim));
    return;
  }
  constexpr size_t kFour = 4 * sizeof(float);
#pragma GCC unroll 1
  for (int64_t d = 0; d < dim - 4; d += 4) std::memcpy(to + d, from + d, kFour);
  std::memcpy(to + dim - 4, from + dim - 4, kFour);
}

// One id a row, no padding: a plain gather. D is the width where it is known at compile time, else 0.
template <int D, class Id>
void gather(const Bag& bag, const float* table, const Ids<Id>& ids, int64_t begin, int64_t end, float* out,
            int64_t width, int64_t index, BadId& bad) {
  const int64_t dim = D ? D : bag.dim;
  for (int64_t b = begin; b < end; ++b) {
    if (b + kPrefetch < end) {
      const int64_t ahead = ids(b + kPrefetch, bag.column);
      if (static_cast<uint64_t>(ahead) < static_cast<uint64_t>(bag.vocab)) __builtin_prefetch(table + ahead * dim);
    }
    const int64_t id = ids(b, bag.column);
    const int64_t row = resolve(bag, id);
    float* to = out + b * width + bag.out;
    if (row >= 0) {
      copy_row<D>(table + row * dim, to, dim);
    } else {
      std::memset(to, 0, sizeof(float) * dim);
      if (row == kRefused) bad.note({index, b, bag.column, id});
    }
  }
}

template <class Id>
void pool(const Bag& bag, const float* table, const Ids<Id>& ids, int64_t begin, int64_t end, float* out, int64_t width,
          int64_t index, BadId& bad) {
  const int64_t dim = bag.dim;
  for (int64_t b = begin; b < end; ++b) {
    float* to = out + b * width + bag.out;
    int64_t counted = 0;
    if (bag.pooling != kConcat) std::memset(to, 0, sizeof(float) * dim);
    for (int64_t l = 0; l < bag.length; ++l) {
      const int64_t id = ids(b, bag.column + l);
      const int64_t row = resolve(bag, id);
      if (row == kRefused) bad.note({index, b, bag.column + l, id});
      const float* from = row >= 0 ? table + row * dim : nullptr;
      if (bag.pooling == kConcat) {
        if (from) {
          copy_row<0>(from, to + l * dim, dim);
        } else {
          std::memset(to + l * dim, 0, sizeof(float) * dim);
        }
      } else if (from) {
        if (bag.pooling == kMax && counted > 0) {
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) to[d] = from[d] > to[d] ? from[d] : to[d];
        } else {
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
        }
        ++counted;
      }
    }
    if (bag.pooling == kMean && counted > 1) {
      const float count = static_cast<float>(counted);
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) to[d] /= count;
    }
  }
}

}  // namespace detail

// Rows [begin, end) of the output, without the dense columns. Refused ids give zeros and are noted in `bad`.
template <class Id>
void embedding_bag_fwd(const float* const* weights, const Ids<Id>& ids, const Bag* bags, int64_t n_bags, int64_t begin,
                       int64_t end, float* out, int64_t width, BadId& bad) {
  // tiles of rows: a bag's constants stay in registers and the tile of `out` in the cache
  constexpr int64_t kTile = 64;
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t stop = std::min(end, start + kTile);
    for (int64_t f = 0; f < n_bags; ++f) {
      const Bag& bag = bags[f];
      const float* table = weights[bag.table] + bag.offset * bag.dim;
      if (bag.length != 1) {
        detail::pool(bag, table, ids, start, stop, out, width, f, bad);
      } else if (bag.dim == 4) {
        detail::gather<4>(bag, table, ids, start, stop, out, width, f, bad);
      } else if (bag.dim == 8) {
        detail::gather<8>(bag, table, ids, start, stop, out, width, f, bad);
      } else if (bag.dim == 16) {
        detail::gather<16>(bag, table, ids, start, stop, out, width, f, bad);
      } else if (bag.dim == 32) {
        detail::gather<32>(bag, table, ids, start, stop, out, width, f, bad);
      } else {
        detail::gather<0>(bag, table, ids, start, stop, out, width, f, bad);
      }
    }
  }
}

// A range of rows of one gradient and the bags that may write there: one thread's piece of work.
struct Unit {
  int64_t table;
  int64_t begin, end;         // rows of the weight
  std::vector<int64_t> bags;  // ascending; empty: rows that no bag reads
  double cost;
};

// Cuts the gradients with needs[t] into units that no two share a row: tables that overlap (shared ones) stay together,
// large ones are cut by rows so that about `threads` equal shares can be made. Units of a weight come in the order of
// its rows. `clear` is what a row costs that is only cleared; 0 where the gradient is sparse.
inline std::vector<Unit> plan_bwd(const Bag* bags, int64_t n_bags, const int64_t* rows, const int64_t* dims,
                                  const std::vector<bool>& needs, int64_t n_tables, int64_t n_rows, int64_t threads,
                                  double clear = 0.25) {
  std::vector<Unit> groups;
  for (int64_t t = 0; t < n_tables; ++t) {
    if (!needs[t]) continue;
    std::vector<int64_t> mine;
    for (int64_t f = 0; f < n_bags; ++f) {
      if (bags[f].table == t) mine.push_back(f);
    }
    std::stable_sort(mine.begin(), mine.end(), [&](int64_t a, int64_t b) { return bags[a].offset < bags[b].offset; });
    int64_t at = 0;  // rows below are covered
    for (int64_t f : mine) {
      const int64_t begin = bags[f].offset, end = begin + bags[f].vocab;
      if (begin < at) {
        groups.back().end = std::max(groups.back().end, end);
      } else {
        if (begin > at) groups.push_back({t, at, begin, {}, 0});
        groups.push_back({t, begin, end, {}, 0});
      }
      groups.back().bags.push_back(f);
      at = groups.back().end;
    }
    if (at < rows[t]) groups.push_back({t, at, rows[t], {}, 0});
  }

  // in units of one float written: clearing is streaming, adding is not, and each piece reads all ids of its bags
  constexpr double kAdd = 1.0, kScan = 2.0;
  double total = 0;
  for (Unit& group : groups) {
    std::sort(group.bags.begin(), group.bags.end());
    const double dim = static_cast<double>(dims[group.table]);
    group.cost = clear * dim * static_cast<double>(group.end - group.begin);
    for (int64_t f : group.bags) group.cost += static_cast<double>(n_rows * bags[f].length) * (kAdd * dim + kScan);
    total += group.cost;
  }
  const double share = total / static_cast<double>(2 * threads);
  std::vector<Unit> units;
  for (const Unit& group : groups) {
    const int64_t height = group.end - group.begin;
    int64_t pieces = threads > 1 ? static_cast<int64_t>(group.cost / share) : 1;
    pieces = std::clamp<int64_t>(pieces, 1, std::max<int64_t>(1, std::min(threads, height)));
    for (int64_t p = 0; p < pieces; ++p) {
      units.push_back({group.table, group.begin + height * p / pieces, group.begin + height * (p + 1) / pieces,
                       group.bags, group.cost / static_cast<double>(pieces)});
    }
  }
  return units;
}

// Deals units to `threads` hands, the largest first to the emptiest hand.
inline std::vector<std::vector<int64_t>> deal(const std::vector<Unit>& units, int64_t threads) {
  std::vector<int64_t> order(units.size());
  for (size_t u = 0; u < order.size(); ++u) order[u] = static_cast<int64_t>(u);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return units[a].cost > units[b].cost; });
  std::vector<std::vector<int64_t>> hands(static_cast<size_t>(threads));
  std::vector<double> load(static_cast<size_t>(threads), 0.0);
  for (int64_t u : order) {
    const size_t hand = static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    hands[hand].push_back(u);
    load[hand] += units[u].cost;
  }
  return hands;
}

namespace detail {

template <int D, class Id>
void scatter(const Bag& bag, const Unit& unit, const float* grad, int64_t grad_stride, const Ids<Id>& ids,
             int64_t n_rows, float* dweight) {
  const int64_t dim = D ? D : bag.dim;
  const int64_t lo = unit.begin - bag.offset, hi = unit.end - bag.offset;
  float* table = dweight + bag.offset * dim;
  for (int64_t b = 0; b < n_rows; ++b) {
    if (b + kPrefetch < n_rows) {
      const int64_t ahead = ids(b + kPrefetch, bag.column);
      if (ahead >= lo && ahead < hi) __builtin_prefetch(table + ahead * dim, 1);
    }
    const int64_t row = resolve(bag, ids(b, bag.column));
    if (row < lo || row >= hi || row < 0) continue;
    float* to = table + row * dim;
    const float* from = grad + b * grad_stride + bag.out;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
  }
}

template <class Id>
void scatter_row(const Bag& bag, const Unit& unit, const float* grad_row, const Ids<Id>& ids, int64_t b,
                 float* dweight) {
  const int64_t lo = unit.begin - bag.offset, hi = unit.end - bag.offset;
  float* table = dweight + bag.offset * bag.dim;
  float count = 1;
  if (bag.pooling == kMean) {
    int64_t counted = 0;
    for (int64_t l = 0; l < bag.length; ++l) counted += resolve(bag, ids(b, bag.column + l)) >= 0;
    count = static_cast<float>(counted) + kMeanEpsilon;
  }
  for (int64_t l = 0; l < bag.length; ++l) {
    const int64_t row = resolve(bag, ids(b, bag.column + l));
    if (row < lo || row >= hi || row < 0) continue;
    float* to = table + row * bag.dim;
    const float* from = grad_row + bag.out + (bag.pooling == kConcat ? l * bag.dim : 0);
    if (bag.pooling == kMean) {
#pragma omp simd
      for (int64_t d = 0; d < bag.dim; ++d) to[d] += from[d] / count;
    } else {
#pragma omp simd
      for (int64_t d = 0; d < bag.dim; ++d) to[d] += from[d];
    }
  }
}

}  // namespace detail

// Clears and fills the rows of one unit of a gradient [rows, dim] from the output's gradient [B, width] (row stride
// grad_stride). Ids that were refused, skipped or changed since the forward are left out, never followed.
template <class Id>
void embedding_bag_bwd(const Unit& unit, const Bag* bags, int64_t dim, const float* grad, int64_t grad_stride,
                       const Ids<Id>& ids, int64_t n_rows, float* dweight) {
  std::fill_n(dweight + unit.begin * dim, dim * (unit.end - unit.begin), 0.0f);
  if (unit.bags.size() == 1 && bags[unit.bags[0]].length == 1) {
    const Bag& bag = bags[unit.bags[0]];
    if (dim == 4) {
      detail::scatter<4>(bag, unit, grad, grad_stride, ids, n_rows, dweight);
    } else if (dim == 8) {
      detail::scatter<8>(bag, unit, grad, grad_stride, ids, n_rows, dweight);
    } else if (dim == 16) {
      detail::scatter<16>(bag, unit, grad, grad_stride, ids, n_rows, dweight);
    } else if (dim == 32) {
      detail::scatter<32>(bag, unit, grad, grad_stride, ids, n_rows, dweight);
    } else {
      detail::scatter<0>(bag, unit, grad, grad_stride, ids, n_rows, dweight);
    }
    return;
  }
  for (int64_t b = 0; b < n_rows; ++b) {
    for (int64_t f : unit.bags) detail::scatter_row(bags[f], unit, grad + b * grad_stride, ids, b, dweight);
  }
}

}  // namespace fastmtl
