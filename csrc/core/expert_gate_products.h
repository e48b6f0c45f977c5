// The matrix products of expert_gate: in fp32 by the Runtime's library, or in bf16 on weights that are packed once a
// call.
#pragma once

#include <algorithm>
#include <vector>

#include "core/expert_gate.h"
#include "core/packed_gemm.h"

namespace fastmtl {

// The weights of a layer in bf16, packed in the pieces in which products take them. Norms are counted through the
// hidden layers, the gates' is last.
class PackedWeights {
 public:
  // by_depth: for dz W, otherwise for x W^T.
  PackedWeights(const ExpertGateLayer& spec, const ExpertGateParams& params, bool by_depth) : by_depth_(by_depth) {
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
    packed_ = std::make_unique<Scratch<Bf16>>(size_);
  }

  int64_t count() const { return static_cast<int64_t>(pieces_.size()); }

  void pack(int64_t index) const {
    const Piece& p = pieces_[index];
    const int64_t n = p.columns.size();
    best_packed_gemm().pack_bf16(by_depth_ ? p.fan_in : n, by_depth_ ? n : p.fan_in,
                                 p.weight + p.columns.start * p.fan_in, p.fan_in, by_depth_, packed_->get() + p.start);
  }

  // The piece that starts with that column.
  const Bf16* at(int64_t norm, int64_t column) const { return packed_->get() + starts_[norm][column]; }

 private:
  struct Piece {
    const float* weight;
    Range columns;
    int64_t fan_in, start;
  };

  void add(int64_t norm, const float* weight, Range columns, int64_t fan_in, int64_t all_columns) {
    starts_[norm].resize(static_cast<size_t>(all_columns));
    starts_[norm][columns.start] = size_;
    pieces_.push_back({weight, columns, fan_in, size_});
    size_ += by_depth_ ? packed_bf16_size(fan_in, columns.size()) : packed_bf16_size(columns.size(), fan_in);
  }

  const bool by_depth_;
  std::vector<Piece> pieces_;
  std::vector<std::vector<int64_t>> starts_;  // [norm][first column of a piece]
  int64_t size_ = 0;
  std::unique_ptr<Scratch<Bf16>> packed_;
};

}  // namespace fastmtl
