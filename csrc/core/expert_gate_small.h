// Small tables folded into expert_gate's first layer and gates, in training: x lacks their columns, and instead of it
// there is the row of each table that each row of the batch looked up.
//
//   forward    z = x_kept W_kept^T + the sum over the tables of sums[pick],   sums = table W_table^T
//   backward   s[row] = the sum of dz over the rows of the batch that picked it;
//              dW_table = s^T table,   dtable = s W_table
//
// A table of V rows and width D so costs an addition of a row of sums forward and one of dz backward for each row of
// the batch, where three products took 3 D multiply-adds; what is multiplied is V rows, not B.
//
// Layout      sums and s lie in pieces of columns, each [R + 1, ld] as SmallTables numbers the rows.
// Accumulation fp32: the tables in their order; s over kStretchRows rows of the batch at a time, and these in their
//             order; dtable over pieces of columns in their order, in double.
// Threading, determinism, aliasing: expert_gate.h. Picks must be below R + 1.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/expert_gate.h"
#include "core/small_tables.h"

namespace fastmtl {

struct SmallInputs {
  SmallTables tables;    // over the columns of the weights
  const int32_t* picks;  // [B, tables.count()], rows of the sums
};

// A weight that reads the inputs, and the columns of z that some of its rows make.
struct FirstWeight {
  int64_t norm;
  const float* weight;  // [all columns, weight_columns]
  Range columns;
};

// The first layer in pieces as its products take them, then the gates; of a layer with one input.
inline std::vector<FirstWeight> first_weights(const ExpertGateLayer& spec, const ExpertGateParams& params) {
  std::vector<FirstWeight> found;
  for (const Range& piece : pieces_of({0, spec.columns(0)}, spec.group_columns(0))) {
    found.push_back({0, params.hidden[0].weight, piece});
  }
  if (spec.gate_columns > 0) found.push_back({spec.depth(), params.gate.weight, {0, spec.gate_columns}});
  return found;
}

// What the first layer and the gates make of each row of the tables.
class SmallSums {
 public:
  SmallSums(const ExpertGateLayer& spec, const ExpertGateParams& params, const SmallInputs& small)
      : spec_(spec), small_(small), pieces_(first_weights(spec, params)), memory_(size_of(small, pieces_)) {
    float* at = memory_.get();
    for (const FirstWeight& piece : pieces_) {
      starts_.push_back(at);
      at += piece_size(small, piece);
    }
  }

  int64_t count() const { return static_cast<int64_t>(pieces_.size()); }

  void make(int64_t index) const {
    const FirstWeight& piece = pieces_[index];
    const int64_t n = piece.columns.size(), ld = SmallTables::stride(n), width = spec_.weight_columns;
    float* to = starts_[index];
    best_kernels().fold(small_.tables.all().data(), small_.tables.count(), n,
                        piece.weight + piece.columns.start * width, width, to, ld);
    std::fill_n(to + small_.tables.zero_row() * ld, ld, 0.0f);
  }

  // z of some rows and of the columns of a piece: what the tables give to it.
  void add_up(int64_t norm, Range rows, Range columns, float* z, int64_t ld_z) const {
    size_t index = 0;
    while (pieces_[index].norm != norm || pieces_[index].columns.start != columns.start) ++index;
    const int64_t n = small_.tables.count();
    best_kernels().add_up(rows.size(), columns.size(), small_.picks + rows.start * n, n, n, starts_[index],
                          SmallTables::stride(columns.size()), z, ld_z);
  }

 private:
  static int64_t piece_size(const SmallInputs& small, const FirstWeight& piece) {
    return (small.tables.zero_row() + 1) * SmallTables::stride(piece.columns.size());
  }
  static int64_t size_of(const SmallInputs& small, const std::vector<FirstWeight>& pieces) {
    int64_t size = 0;
    for (const FirstWeight& piece : pieces) size += piece_size(small, piece);
    return size;
  }

  const ExpertGateLayer& spec_;
  const SmallInputs& small_;
  const std::vector<FirstWeight> pieces_;
  const Scratch<float> memory_;
  std::vector<float*> starts_;
};

// The gradients of the tables, and of the weights' columns that read them.
class SmallGrads {
 public:
  // to: [sum of rows x dim], the tables one behind the other; null where it is not wanted.
  SmallGrads(const ExpertGateLayer& spec, const ExpertGateParams& params, const ExpertGateGrads& grads,
             const SmallInputs& small, int64_t n_rows, float* to)
      : spec_(spec), grads_(grads), small_(small), to_(to), tables_(small.tables.all()) {
    for (const FirstWeight& whole : first_weights(spec, params)) {
      for (int64_t c = whole.columns.start; c < whole.columns.stop; c += kColumns) {
        pieces_.push_back({whole.norm, whole.weight, {c, std::min(whole.columns.stop, c + kColumns)}});
      }
    }
    for (const SmallTable& table : tables_) size_ += table.rows * table.dim;
    leave_out_unread(n_rows);
    if (to) parts_.resize(pieces_.size() * static_cast<size_t>(size_));
  }

  // Numbers of scratch that a thread needs.
  static int64_t scratch_size(const SmallTables& tables) { return 2 * (tables.zero_row() + 1) * kColumns; }

  int64_t count() const { return static_cast<int64_t>(pieces_.size()); }
  bool of_gates(int64_t index) const { return pieces_[index].norm == spec_.depth(); }

  // dz: of the hidden layer or of the gates, whichever the piece is of.
  template <class T>
  void make(int64_t index, const Grouped<T>& dz, int64_t n_rows, float* scratch) {
    const FirstWeight& piece = pieces_[index];
    const SmallTables& tables = small_.tables;
    const int64_t n = piece.columns.size(), ld = round_up(n, kPanel), width = spec_.weight_columns;
    const int64_t n_picks = tables.count(), size = (tables.zero_row() + 1) * ld;
    float *const sums = scratch, *const some = scratch + size;
    std::fill_n(sums, size, 0.0f);
    for (int64_t row = 0; row < n_rows; row += kStretchRows) {
      float* into = row == 0 ? sums : some;
      if (row > 0) std::fill_n(some, size, 0.0f);
      best_tile_kernels<T>().sum_by_pick(std::min(kStretchRows, n_rows - row), n, small_.picks + row * n_picks, n_picks,
                                         n_picks, dz.at(row, piece.columns.start), dz.ld, into, ld);
      for (int64_t i = 0; row > 0 && i < size; ++i) sums[i] += some[i];
    }
    float* dweight = piece.norm == 0 ? grads_.hidden[0].weight : grads_.gate.weight;
    const int64_t first = piece.columns.start * width;
    best_kernels().fold_grad(tables_.data(), n_picks, n, piece.weight + first, width, sums, ld, dweight + first,
                             to_ ? parts_.data() + index * size_ : nullptr);
  }

  // The tables' gradients, from those of all pieces.
  void finish() const {
    for (int64_t i = 0; to_ && i < size_; ++i) {
      double total = 0;
      for (size_t piece = 0; piece < pieces_.size(); ++piece) {
        total += static_cast<double>(parts_[piece * static_cast<size_t>(size_) + static_cast<size_t>(i)]);
      }
      to_[i] = static_cast<float>(total);
    }
  }

 private:
  static constexpr int64_t kColumns = 4 * kPanel;  // whose sums of some hundred rows stay in the nearest caches

  // Rows that the batch does not read become 0 where something is not finite, because NaN times a sum of nothing is
  // not 0.
  void leave_out_unread(int64_t n_rows) {
    bool finite = true;
    for (const SmallTable& table : tables_) {
      for (int64_t i = 0; i < table.rows * table.dim; ++i) finite &= std::isfinite(table.values[i]);
    }
    if (finite) return;
    std::vector<bool> is_read(static_cast<size_t>(small_.tables.zero_row() + 1));
    for (int64_t i = 0; i < n_rows * small_.tables.count(); ++i) is_read[static_cast<size_t>(small_.picks[i])] = true;
    values_.resize(static_cast<size_t>(size_));
    float* to = values_.data();
    int64_t row = 0;
    for (SmallTable& table : tables_) {
      const float* from = std::exchange(table.values, to);
      for (int64_t v = 0; v < table.rows; ++v, ++row, from += table.dim, to += table.dim) {
        if (is_read[static_cast<size_t>(row)]) std::copy_n(from, table.dim, to);
      }
    }
  }

  const ExpertGateLayer& spec_;
  const ExpertGateGrads& grads_;
  const SmallInputs& small_;
  float* const to_;
  std::vector<FirstWeight> pieces_;
  int64_t size_ = 0;
  std::vector<SmallTable> tables_;
  std::vector<float> values_;  // [size_], the tables one behind the other, where rows are left out
  std::vector<float> parts_;   // [pieces, size_]
};

}  // namespace fastmtl
