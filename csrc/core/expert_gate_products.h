// The weights and the inputs of expert_gate as its products read them: packed once a call.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "core/expert_gate.h"
#include "core/expert_gate_small.h"
#include "core/packed_gemm.h"

namespace fastmtl {

// Whether a product in fp32 is left to Kernels::small_gemm, which reads the weights as they are.
inline bool is_small(int64_t m, int64_t n, int64_t k) { return m * n * k <= kSmallProduct; }

// The weights of a layer, packed as T in the pieces in which products take them. Norms are counted through the hidden
// layers, the gates' is last.
template <class T>
class PackedWeights {
 public:
  // dx_columns: for dz W, of whose result for the inputs so many columns are wanted; -1: for x W^T. rows: the most that
  // a product has, by which small ones are left out. small: tables whose columns the products leave out; null: none.
  PackedWeights(const ExpertGateLayer& spec, const ExpertGateParams& params, int64_t rows, int64_t dx_columns,
                const SmallInputs* small)
      : spec_(spec), params_(params), rows_(rows), dx_columns_(dx_columns), small_(small) {
    starts_.resize(static_cast<size_t>(spec.depth() + 1));
    for (int64_t l = 0; l < spec.depth(); ++l) {
      const float* weight = params.hidden[l].weight;
      if (l > 0) {
        for (int64_t e = 0; e < spec.n_experts; ++e) {
          add(l, weight, {e * spec.dims[l], (e + 1) * spec.dims[l]}, spec.fan_in(l), spec.columns(l));
        }
        continue;
      }
      for (const Range& experts : spec.experts_of) {
        const Range columns{experts.start * spec.dims[0], experts.stop * spec.dims[0]};
        for (const Range& piece : pieces_of(columns, spec.group_columns(0))) {
          add(0, weight, piece, spec.in_features, spec.columns(0));
        }
      }
      for (const Range& columns : spec.gate_columns_of) {
        if (columns.size()) add(spec.depth(), params.gate.weight, columns, spec.in_features, spec.gate_columns);
      }
    }
    packed_ = std::make_unique<Scratch<T>>(size_);
    const int64_t read = spec.depth() ? spec.columns(0) + spec.gate_columns : 0;
    kept_ = std::make_unique<Scratch<float>>(small ? read * spec.in_features : 0);
  }

  int64_t count() const { return static_cast<int64_t>(pieces_.size()); }

  void pack(int64_t index) const {
    const Piece& p = pieces_[index];
    const float* weight = plain(p.norm, p.columns.start);
    if (leaves_out(p.norm)) {
      const int64_t width = spec_.weight_columns;
      small_->tables.keep_columns(p.columns.size(), width, p.weight + p.columns.start * width,
                                  kept(p.norm, p.columns.start));
    }
    if (p.start < 0) return;
    const int64_t n = width_of(p.norm, p.columns), k = by_depth() ? p.columns.size() : p.fan_in;
    T* to = packed_->get() + p.start;
    if constexpr (kBf16) {
      best_packed_gemm().pack_bf16(n, k, weight, p.fan_in, by_depth(), to);
    } else {
      best_packed_gemm().pack_f32(n, k, weight, p.fan_in, by_depth(), to);
    }
  }

  // The weight of a norm as it is (once it was packed, where tables are folded), from that column on: [.., fan_in].
  const float* plain(int64_t norm, int64_t column) const {
    if (leaves_out(norm)) return kept(norm, column);
    if (norm == spec_.depth()) return params_.gate.weight + column * spec_.in_features;
    return params_.hidden[norm].weight + column * spec_.fan_in(norm);
  }

  // The piece that starts with that column.
  const T* at(int64_t norm, int64_t column) const { return packed_->get() + starts_[norm][column]; }

 private:
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  struct Piece {
    int64_t norm;
    const float* weight;
    Range columns;
    int64_t fan_in, start;  // start < 0: nothing reads it packed
  };

  float* kept(int64_t norm, int64_t column) const {
    return kept_->get() + ((norm == 0 ? 0 : spec_.columns(0)) + column) * spec_.in_features;
  }
  bool by_depth() const { return dx_columns_ >= 0; }
  // Columns of a product's result.
  int64_t width_of(int64_t norm, Range columns) const {
    if (!by_depth()) return columns.size();
    return norm == 0 || norm == spec_.depth() ? dx_columns_ : spec_.fan_in(norm);
  }

  // Whether products with this norm's weight leave out the columns of folded tables.
  bool leaves_out(int64_t norm) const { return small_ && (norm == 0 || norm == spec_.depth()); }

  void add(int64_t norm, const float* weight, Range columns, int64_t fan_in, int64_t all_columns) {
    if (!kBf16 && is_small(rows_, columns.size(), fan_in)) {
      if (leaves_out(norm)) pieces_.push_back({norm, weight, columns, fan_in, -1});
      return;
    }
    starts_[norm].resize(static_cast<size_t>(all_columns));
    starts_[norm][columns.start] = size_;
    pieces_.push_back({norm, weight, columns, fan_in, size_});
    const int64_t n = width_of(norm, columns), k = by_depth() ? columns.size() : fan_in;
    // each on a cache line
    size_ += kBf16 ? packed_bf16_size(n, k) : packed_f32_size(n, k);
  }

  const ExpertGateLayer& spec_;
  const ExpertGateParams& params_;
  const int64_t rows_;
  const int64_t dx_columns_;
  const SmallInputs* const small_;
  std::vector<Piece> pieces_;
  std::vector<std::vector<int64_t>> starts_;  // [norm][first column of a piece]
  int64_t size_ = 0;
  std::unique_ptr<Scratch<T>> packed_;
  std::unique_ptr<Scratch<float>> kept_;  // [first layer's columns, then the gates', in_features]
};

// The rounded inputs, packed for the gradient of the weights that read them, some rows at a time.
template <class T>
class PackedInputs {
 public:
  PackedInputs(const ExpertGateLayer& spec, const ExpertGateSaved<T>& saved, int64_t n_rows)
      : saved_(saved),
        features_(spec.in_features),
        rows_(n_rows),
        inputs_(spec.n_inputs),
        stretches_((n_rows + kStretchRows - 1) / kStretchRows),
        size_(packed_bf16_size(features_, kStretchRows)),
        packed_(inputs_ * stretches_ * size_) {}
  int64_t count() const { return inputs_ * stretches_; }
  void pack(int64_t index) const {
    const int64_t n = index / stretches_, start = index % stretches_ * kStretchRows;
    best_packed_gemm().repack_bf16(features_, std::min(kStretchRows, rows_ - start),
                                   saved_.x + (n * rows_ + start) * saved_.ld_x, saved_.ld_x, true, at(n, start));
  }
  Bf16* at(int64_t n, int64_t row) const { return packed_.get() + (n * stretches_ + row / kStretchRows) * size_; }

 private:
  const ExpertGateSaved<T>& saved_;
  const int64_t features_, rows_, inputs_, stretches_, size_;
  const Scratch<Bf16> packed_;
};

}  // namespace fastmtl
