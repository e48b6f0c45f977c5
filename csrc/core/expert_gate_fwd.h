// expert_gate forward. In training one phase over the tiles a hidden layer (activation of the layer before, GEMM,
// column statistics while the tile is in the cache) and one for the mix or the output layer; in evaluation, where the
// statistics are known, one phase in all. Layout, threading, determinism: expert_gate.h.
#pragma once

#include "core/expert_gate.h"
#include "core/expert_gate_products.h"

namespace fastmtl {

template <class Runtime>
class ExpertGateForward {
 public:
  // out: [G, B, H] or [E, B, H] dense, or [B, E] with an output layer. In bf16 where `saved` has the inputs so.
  ExpertGateForward(const Runtime& runtime, const ExpertGateLayer& spec, const ExpertGateParams& params, Inputs x,
                    int64_t n_rows, bool training, double dropout, int64_t seed, const ExpertGateSaved& saved,
                    float* out)
      : runtime_(runtime),
        kernels_(best_kernels()),
        spec_(spec),
        params_(params),
        x_(x),
        tiles_(n_rows),
        // one row has no batch statistics
        batch_statistics_(training && n_rows > 1),
        dropout_(training ? dropout : 0),
        seed_(seed),
        saved_(saved),
        out_(out) {}

  void run() {
    const int64_t depth = spec_.depth();
    for (int64_t l = 0; l < depth; ++l) factors_.push_back(hidden_factors(spec_, params_, saved_, l));
    if (has_gates()) factors_.emplace_back(saved_.gate, params_.gate, spec_.gate_columns);
    if (saved_.x) packed_ = std::make_unique<PackedWeights>(spec_, params_, false);
    const int64_t work = tiles_.rows * spec_.row_work();
    if (!batch_statistics_) {
      for (int64_t l = 0; l < depth; ++l) use_running(params_.hidden[l], saved_.hidden[l], factors_[l]);
      if (has_gates()) use_running(params_.gate, saved_.gate, factors_[depth]);
      runtime_.team(2, tiles_.count, work, [&](Phases::Worker& worker) {
        pack(worker);
        worker.run(tiles_.count, [&](int64_t tile) {
          for (int64_t l = 0; l < depth; ++l) linear(l, tile);
          join(tiles_.at(tile));
        });
      });
      return;
    }
    for (int64_t l = 0; l < depth; ++l) partials_.emplace_back(tiles_.count, spec_.columns(l));
    if (has_gates()) partials_.emplace_back(tiles_.count, spec_.gate_columns);
    runtime_.team(2 * depth + 2, tiles_.count, work, [&](Phases::Worker& worker) {
      pack(worker);
      for (int64_t l = 0; l < depth; ++l) {
        worker.run(tiles_.count, [&](int64_t tile) { linear(l, tile); });
        const int64_t pieces = n_pieces(spec_.columns(l)), gates = l == 0 && has_gates();
        worker.run(pieces + gates, [&](int64_t piece) {
          if (piece < pieces) return take(l, params_.hidden[l], saved_.hidden[l], piece_of(factors_[l].all(), piece));
          take(depth, params_.gate, saved_.gate, factors_[depth].all());
        });
      }
      worker.run(tiles_.count, [&](int64_t tile) { join(tiles_.at(tile)); });
    });
  }

 private:
  // Each tile's column means and sums of squared deviations.
  struct Partials {
    int64_t columns;
    std::vector<double> mean, m2;
    Partials(int64_t tiles, int64_t n)
        : columns(n), mean(static_cast<size_t>(tiles * n)), m2(static_cast<size_t>(tiles * n)) {}
  };

  void pack(Phases::Worker& worker) const {
    if (packed_) worker.run(packed_->count(), [&](int64_t i) { packed_->pack(i); });
  }

  bool has_gates() const { return !spec_.gates.empty(); }

  // With the bias taken into the mean, evaluation and training share everything that follows.
  static void use_running(const LinearNorm& norm, const Normalised& to, ColumnFactors& factors) {
    const Range columns = factors.all();
    for (int64_t c = columns.start; c < columns.stop; ++c) {
      keep(to, c, static_cast<double>(norm.running_mean[c]) - static_cast<double>(norm.bias[c]),
           static_cast<double>(norm.running_var[c]));
    }
    factors.fill(columns);
  }

  static void keep(const Normalised& to, int64_t c, double mean, double var) {
    const double rstd = 1 / std::sqrt(var + kBatchNormEpsilon);
    to.mean[c] = static_cast<float>(mean);
    to.rstd[c] = static_cast<float>(rstd);
    to.mean_rest[c] = static_cast<float>(mean - static_cast<double>(to.mean[c]));
    to.rstd_rest[c] = static_cast<float>(rstd - static_cast<double>(to.rstd[c]));
  }

  void linear(int64_t l, int64_t tile_index) {
    const Range rows = tiles_.at(tile_index);
    const Normalised& to = saved_.hidden[l];
    const float* weight = params_.hidden[l].weight;
    const int64_t fan_in = spec_.fan_in(l), width = spec_.dims[l];
    if (l == 0) {
      for (int64_t n = 0; n < spec_.n_inputs; ++n) {
        if (packed_) {
          best_packed_gemm().round_bf16(rows.size(), fan_in, x_.at(n, rows.start), x_.row_stride, rounded(n, rows),
                                        saved_.ld_x);
        }
        const Range experts{spec_.experts_of[n].start * width, spec_.experts_of[n].stop * width};
        for (int64_t piece = 0; piece < n_pieces(experts.size()); ++piece) {
          first_product(n, tile_index, piece_of(experts, piece), weight, to, 0);
        }
        first_product(n, tile_index, spec_.gate_columns_of[n], params_.gate.weight, saved_.gate, spec_.depth());
      }
      return;
    }
    const Scratch h(rows.size() * fan_in);
    const int64_t ld_near = bf16_stride(fan_in);
    const Bf16Scratch near(packed_ ? rows.size() * ld_near : 0);
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      kernels_.hidden(tile(l - 1, rows, {e * fan_in, (e + 1) * fan_in}), h.get(), fan_in);
      float* z = to.z + rows.start * to.ld + e * width;
      if (packed_) {
        best_packed_gemm().round_bf16(rows.size(), fan_in, h.get(), fan_in, near.get(), ld_near);
        best_packed_gemm().gemm_bf16(rows.size(), width, fan_in, near.get(), ld_near, packed_->at(l, e * width), z,
                                     to.ld, false);
      } else {
        runtime_.gemm(rows.size(), width, fan_in, h.get(), fan_in, false, weight + e * width * fan_in, fan_in, true, z,
                      to.ld, false);
      }
      note(to, tile_index, {e * width, (e + 1) * width}, l);
    }
  }

  void first_product(int64_t n, int64_t tile_index, Range columns, const float* weight, const Normalised& to,
                     int64_t norm) {
    if (columns.size() == 0) return;
    const Range rows = tiles_.at(tile_index);
    float* z = to.z + rows.start * to.ld + columns.start;
    if (packed_) {
      best_packed_gemm().gemm_bf16(rows.size(), columns.size(), spec_.in_features, rounded(n, rows), saved_.ld_x,
                                   packed_->at(norm, columns.start), z, to.ld, false);
    } else {
      runtime_.gemm(rows.size(), columns.size(), spec_.in_features, x_.at(n, rows.start), x_.row_stride, false,
                    weight + columns.start * spec_.in_features, spec_.in_features, true, z, to.ld, false);
    }
    note(to, tile_index, columns, norm);
  }

  Bf16* rounded(int64_t n, Range rows) const { return saved_.x + (n * tiles_.rows + rows.start) * saved_.ld_x; }

  // The statistics of what a product has just written, while it is in the cache. Norms are counted through the hidden
  // layers, the gates' is last.
  void note(const Normalised& of, int64_t tile_index, Range columns, int64_t norm) {
    if (!batch_statistics_) return;
    const Range rows = tiles_.at(tile_index);
    Partials& partials = partials_[norm];
    const int64_t first = tile_index * partials.columns + columns.start;
    kernels_.column_stats(of.z + rows.start * of.ld + columns.start, of.ld, rows.size(), columns.size(),
                          tiles_.rows < kFewRows, partials.mean.data() + first, partials.m2.data() + first);
  }

  // Chan's merge of the tiles, in their order; then the running statistics. (Chan et al., Stanford STAN-CS-79-773.)
  void take(int64_t index, const LinearNorm& norm, const Normalised& to, Range columns) {
    const Partials& partials = partials_[index];
    for (int64_t c = columns.start; c < columns.stop; ++c) {
      double mean = 0, m2 = 0, count = 0;
      for (int64_t tile = 0; tile < tiles_.count; ++tile) {
        const double more = static_cast<double>(tiles_.at(tile).size());
        const double delta = partials.mean[tile * partials.columns + c] - mean;
        const double total = count + more;
        mean += delta * more / total;
        m2 += partials.m2[tile * partials.columns + c] + delta * delta * count * more / total;
        count = total;
      }
      keep(to, c, mean, m2 / count);
      const double with_bias = mean + static_cast<double>(norm.bias[c]), unbiased = m2 / (count - 1);
      blend(norm.running_mean[c], with_bias);
      blend(norm.running_var[c], unbiased);
    }
    factors_[index].fill(columns);
  }

  static void blend(float& running, double now) {
    running = static_cast<float>((1 - kBatchNormMomentum) * static_cast<double>(running) + kBatchNormMomentum * now);
  }

  Tile tile(int64_t l, Range rows, Range columns) const {
    return tile_of(saved_.hidden[l], factors_[l], rows, columns, spec_.dims[l], spec_.activation,
                   dropout_of(dropout_, seed_, l), tiles_.rows < kFewRows);
  }

  // From the last hidden layer to the result.
  void join(Range rows) {
    const int64_t last = spec_.depth() - 1, n_experts = spec_.n_experts;
    if (last < 0) {
      for (int64_t n = 0; n < spec_.n_inputs; ++n) {
        for (int64_t e = spec_.experts_of[n].start; e < spec_.experts_of[n].stop; ++e) {
          kernels_.logits(rows.size(), spec_.in_features, 1, x_.at(n, rows.start), x_.row_stride,
                          params_.out_weight + e * spec_.in_features, params_.out_bias + e,
                          out_ + rows.start * n_experts + e, n_experts);
        }
      }
      return;
    }
    const int64_t width = spec_.dims[last], columns = spec_.columns(last);
    if (!spec_.output_layer && spec_.gates.empty()) {
      for (int64_t e = 0; e < n_experts; ++e) {
        kernels_.hidden(tile(last, rows, {e * width, (e + 1) * width}), out_ + (e * tiles_.rows + rows.start) * width,
                        width);
      }
      return;
    }
    if (!spec_.gates.empty()) {
      kernels_.gate_softmax(
          tile_of(saved_.gate, factors_[last + 1], rows, {0, spec_.gate_columns}, 1, kLinear, Dropout{}, false),
          spec_.gates.data(), spec_.n_gates(), saved_.weights + rows.start * spec_.gate_columns, spec_.gate_columns);
    }
    const Scratch h(kBlock * columns);
    for (int64_t start = rows.start; start < rows.stop; start += kBlock) {
      const Range block{start, std::min(rows.stop, start + kBlock)};
      kernels_.hidden(tile(last, block, {0, columns}), h.get(), columns);
      if (spec_.output_layer) {
        kernels_.logits(block.size(), width, n_experts, h.get(), columns, params_.out_weight, params_.out_bias,
                        out_ + start * n_experts, n_experts);
      } else {
        std::vector<float*> to(spec_.gates.size());
        for (size_t g = 0; g < to.size(); ++g) to[g] = out_ + (static_cast<int64_t>(g) * tiles_.rows + start) * width;
        kernels_.mix(spec_.gates.data(), spec_.n_gates(), block.size(), width,
                     saved_.weights + start * spec_.gate_columns, spec_.gate_columns, h.get(), columns, to.data(),
                     width);
      }
    }
  }

  const Runtime& runtime_;
  const Kernels& kernels_;
  const ExpertGateLayer& spec_;
  const ExpertGateParams& params_;
  const Inputs x_;
  const Tiles tiles_;
  const bool batch_statistics_;
  const double dropout_;
  const int64_t seed_;
  const ExpertGateSaved& saved_;
  float* const out_;
  // of each hidden layer, then of the gates
  std::vector<ColumnFactors> factors_;
  std::vector<Partials> partials_;
  std::unique_ptr<PackedWeights> packed_;  // null: fp32
};

}  // namespace fastmtl
