// expert_gate forward. In training one phase over the tiles a hidden layer (activation of the layer before, GEMM,
// column statistics while the tile is in the cache) and one for the mix or the output layer; in evaluation, where the
// statistics are known, one phase in all. Layout, threading, determinism: expert_gate.h.
#pragma once

#include "core/expert_gate.h"
#include "core/expert_gate_products.h"
#include "core/expert_gate_small.h"

namespace fastmtl {

template <class T, class Runtime>
class ExpertGateForward {
 public:
  // out: [G, B, H] or [E, B, H] dense, or [B, E] with an output layer. small: see expert_gate_small.h; may be null.
  ExpertGateForward(const Runtime& runtime, const ExpertGateLayer& spec, const ExpertGateParams& params, Inputs x,
                    int64_t n_rows, bool training, double dropout, int64_t seed, const ExpertGateSaved<T>& saved,
                    float* out, const SmallInputs* small)
      : runtime_(runtime),
        kernels_(best_kernels()),
        of_tiles_(best_tile_kernels<T>()),
        spec_(spec),
        params_(params),
        x_(x),
        tiles_(n_rows),
        // one row has no batch statistics
        batch_statistics_(training && n_rows > 1),
        dropout_(training ? dropout : 0),
        seed_(seed),
        saved_(saved),
        out_(out),
        small_(small) {}

  void run() {
    const int64_t depth = spec_.depth();
    for (int64_t l = 0; l < depth; ++l) factors_.push_back(hidden_factors(spec_, params_, saved_, l));
    if (has_gates()) factors_.emplace_back(saved_.gate, params_.gate, spec_.gate_columns);
    packed_ = std::make_unique<PackedWeights<T>>(spec_, params_, tiles_.most(), -1, small_);
    if (small_) sums_ = std::make_unique<SmallSums>(spec_, params_, *small_);
    const int64_t work = tiles_.rows * spec_.row_work();
    if (!batch_statistics_) {
      for (int64_t l = 0; l < depth; ++l) use_running(params_.hidden[l], saved_.hidden[l], factors_[l]);
      if (has_gates()) use_running(params_.gate, saved_.gate, factors_[depth]);
      runtime_.team(2, tiles_.count, work, [&](Phases::Worker& worker) {
        const Space space(spec_, tiles_);
        pack(worker);
        worker.run(tiles_.count, [&](int64_t tile) {
          for (int64_t l = 0; l < depth; ++l) linear(l, tile, space);
          join(tiles_.at(tile), space);
        });
      });
      return;
    }
    for (int64_t l = 0; l < depth; ++l) partials_.emplace_back(tiles_.count, spec_.columns(l));
    if (has_gates()) partials_.emplace_back(tiles_.count, spec_.gate_columns);
    runtime_.team(2 * depth + 2, tiles_.count, work, [&](Phases::Worker& worker) {
      const Space space(spec_, tiles_);
      pack(worker);
      for (int64_t l = 0; l < depth; ++l) {
        worker.run(tiles_.count, [&](int64_t i) { linear(l, tiles_.in_turn(i, l), space); });
        const int64_t pieces = n_pieces(spec_.columns(l)), gates = l == 0 && has_gates();
        worker.run(pieces + gates, [&](int64_t piece) {
          if (piece < pieces) return take(l, params_.hidden[l], saved_.hidden[l], piece_of(factors_[l].all(), piece));
          take(depth, params_.gate, saved_.gate, factors_[depth].all());
        });
      }
      worker.run(tiles_.count, [&](int64_t i) { join(tiles_.at(tiles_.in_turn(i, depth)), space); });
    });
  }

 private:
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  // A thread's own memory, which stays in its cache from tile to tile.
  struct Space {
    Scratch<T> h;            // of a tile, or of all columns of a block
    Scratch<float> product;  // of a tile and a piece or an expert, before it is rounded
    Space(const ExpertGateLayer& spec, const Tiles& tiles)
        : h(h_size(spec, tiles)), product(product_size(spec, tiles)) {}
    static int64_t h_size(const ExpertGateLayer& spec, const Tiles& tiles) {
      int64_t size = spec.depth() ? kBlock * spec.columns(spec.depth() - 1) : 0;
      for (int64_t l = 1; l < spec.depth(); ++l) size = std::max(size, tiles.height * row_stride<T>(spec.fan_in(l)));
      return size;
    }
    static int64_t product_size(const ExpertGateLayer& spec, const Tiles& tiles) {
      int64_t width = kPiece;
      for (int64_t l = 1; l < spec.depth(); ++l) width = std::max(width, spec.dims[l]);
      return kBf16 ? tiles.height * row_stride<float>(width) : 0;
    }
  };

  // Each tile's column means and sums of squared deviations.
  struct Partials {
    int64_t columns;
    std::vector<double> mean, m2;
    Partials(int64_t tiles, int64_t n)
        : columns(n), mean(static_cast<size_t>(tiles * n)), m2(static_cast<size_t>(tiles * n)) {}
  };

  void pack(Phases::Worker& worker) const {
    const int64_t weights = packed_->count();
    worker.run(weights + (sums_ ? sums_->count() : 0), [&](int64_t i) {
      if (i < weights) return packed_->pack(i);
      sums_->make(i - weights);
    });
  }

  bool has_gates() const { return !spec_.gates.empty(); }

  // With the bias taken into the mean, evaluation and training share everything that follows.
  static void use_running(const LinearNorm& norm, const Statistics& to, ColumnFactors& factors) {
    const Range columns = factors.all();
    for (int64_t c = columns.start; c < columns.stop; ++c) {
      keep(to, c, static_cast<double>(norm.running_mean[c]) - static_cast<double>(norm.bias[c]),
           static_cast<double>(norm.running_var[c]));
    }
    factors.fill(columns);
  }

  static void keep(const Statistics& to, int64_t c, double mean, double var) {
    const double rstd = 1 / std::sqrt(var + kBatchNormEpsilon);
    to.mean[c] = static_cast<float>(mean);
    to.rstd[c] = static_cast<float>(rstd);
    to.mean_rest[c] = static_cast<float>(mean - static_cast<double>(to.mean[c]));
    to.rstd_rest[c] = static_cast<float>(rstd - static_cast<double>(to.rstd[c]));
  }

  void linear(int64_t l, int64_t tile_index, const Space& space) {
    const Range rows = tiles_.at(tile_index);
    const int64_t fan_in = spec_.fan_in(l), width = spec_.dims[l];
    if (l == 0) {
      for (int64_t n = 0; n < spec_.n_inputs; ++n) {
        const Operand x = input(n, rows);
        const Range experts{spec_.experts_of[n].start * width, spec_.experts_of[n].stop * width};
        for (const Range& piece : pieces_of(experts, spec_.group_columns(0))) {
          product(0, tile_index, piece, x, space, Ahead{});
        }
        gate_product(tile_index, spec_.gate_columns_of[n], x);
      }
      return;
    }
    const int64_t ld = row_stride<T>(fan_in);
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      of_tiles_.hidden(tile(l - 1, rows, {e * fan_in, (e + 1) * fan_in}), space.h.get(), ld);
      Ahead ahead;
      if (e + 1 < spec_.n_experts) ahead.add(part_of(saved_.z[l - 1], rows, {(e + 1) * fan_in, (e + 2) * fan_in}));
      product(l, tile_index, {e * width, (e + 1) * width}, {space.h.get(), ld}, space, ahead);
    }
  }

  struct Operand {
    const T* data;
    int64_t ld;
  };

  Operand input(int64_t n, Range rows) const {
    const float* x = x_.at(n, rows.start);
    if constexpr (kBf16) {
      Bf16* to = saved_.x + (n * tiles_.rows + rows.start) * saved_.ld_x;
      best_packed_gemm().round_bf16(rows.size(), spec_.in_features, x, x_.row_stride, to, saved_.ld_x);
      return {to, saved_.ld_x};
    } else {
      return {x, x_.row_stride};
    }
  }

  // z of some columns of a layer, and their statistics, before z is rounded.
  void product(int64_t l, int64_t tile_index, Range columns, const Operand& h, const Space& space, Ahead ahead) {
    const Range rows = tiles_.at(tile_index);
    const Grouped<T>& to = saved_.z[l];
    T* z = to.at(rows.start, columns.start);
    if constexpr (kBf16) {
      const int64_t ld = row_stride<float>(columns.size());
      float* exact = space.product.get();
      ahead.add(part_of(to, rows, columns));
      multiply(l, rows, columns, h, exact, ld, &ahead);
      if (batch_statistics_) {
        note(l, tile_index, columns, exact, ld, z, to.ld);
      } else {
        best_packed_gemm().round_bf16(rows.size(), columns.size(), exact, ld, z, to.ld);
      }
    } else {
      multiply(l, rows, columns, h, z, to.ld, &ahead);
      note(l, tile_index, columns, z, to.ld, nullptr, 0);
    }
  }

  void gate_product(int64_t tile_index, Range columns, const Operand& x) {
    if (columns.size() == 0) return;
    const Range rows = tiles_.at(tile_index);
    float* z = saved_.gate_z.at(rows.start, columns.start);
    multiply(spec_.depth(), rows, columns, x, z, saved_.gate_z.ld, nullptr);
    note(spec_.depth(), tile_index, columns, z, saved_.gate_z.ld, nullptr, 0);
  }

  // Norms are counted through the hidden layers, the gates' is last.
  void multiply(int64_t norm, Range rows, Range columns, const Operand& h, float* z, int64_t ld,
                const Ahead* ahead) const {
    const bool gate = norm == spec_.depth();
    const int64_t fan_in = gate ? spec_.in_features : spec_.fan_in(norm);
    const bool adds = sums_ && (norm == 0 || gate);
    if (adds) sums_->add_up(norm, rows, columns, z, ld);
    if constexpr (kBf16) {
      best_packed_gemm().gemm_bf16(rows.size(), columns.size(), fan_in, h.data, h.ld, packed_->at(norm, columns.start),
                                   z, ld, adds, ahead);
    } else if (is_small(tiles_.most(), columns.size(), fan_in)) {
      kernels_.small_gemm(rows.size(), columns.size(), fan_in, h.data, h.ld, false, packed_->plain(norm, columns.start),
                          fan_in, true, z, ld, adds, tiles_.most() < kFewRows);
    } else {
      best_packed_gemm().gemm_f32(rows.size(), columns.size(), fan_in, h.data, h.ld, packed_->at(norm, columns.start),
                                  z, ld, adds, ahead);
    }
  }

  // The statistics of what a product has just written, while it is in the cache; keeps it where there is `kept`.
  void note(int64_t norm, int64_t tile_index, Range columns, const float* z, int64_t ld, T* kept, int64_t ld_kept) {
    if (!batch_statistics_) return;
    Partials& partials = partials_[norm];
    const int64_t first = tile_index * partials.columns + columns.start;
    of_tiles_.column_stats(z, ld, tiles_.at(tile_index).size(), columns.size(), tiles_.rows < kFewRows,
                           partials.mean.data() + first, partials.m2.data() + first, kept, ld_kept);
  }

  // Chan's merge of the tiles, in their order; then the running statistics. (Chan et al., Stanford STAN-CS-79-773.)
  void take(int64_t index, const LinearNorm& norm, const Statistics& to, Range columns) {
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

  Tile<T> tile(int64_t l, Range rows, Range columns) const {
    return tile_of(saved_.z[l], factors_[l], rows, columns, spec_.dims[l], spec_.activation,
                   dropout_of(dropout_, seed_, l), tiles_.rows < kFewRows);
  }

  // From the last hidden layer to the result.
  void join(Range rows, const Space& space) {
    const int64_t last = spec_.depth() - 1, n_experts = spec_.n_experts;
    if (last < 0) {
      for (int64_t n = 0; n < spec_.n_inputs; ++n) {
        for (int64_t e = spec_.experts_of[n].start; e < spec_.experts_of[n].stop; ++e) {
          best_tile_kernels<float>().logits(rows.size(), spec_.in_features, 1, x_.at(n, rows.start), x_.row_stride,
                                            params_.out_weight + e * spec_.in_features, params_.out_bias + e,
                                            out_ + rows.start * n_experts + e, n_experts);
        }
      }
      return;
    }
    const int64_t width = spec_.dims[last], columns = spec_.columns(last);
    if (!spec_.output_layer && spec_.gates.empty()) {
      for (int64_t e = 0; e < n_experts; ++e) {
        const Tile<T> t = tile(last, rows, {e * width, (e + 1) * width});
        float* to = out_ + (e * tiles_.rows + rows.start) * width;
        of_tiles_.hidden_f32(t, to, width);
      }
      return;
    }
    if (!spec_.gates.empty()) {
      kernels_.gate_softmax(
          tile_of(saved_.gate_z, factors_[last + 1], rows, {0, spec_.gate_columns}, 1, kLinear, Dropout{}, false),
          spec_.gates.data(), spec_.n_gates(), saved_.weights + rows.start * spec_.gate_columns, spec_.gate_columns);
    }
    T* h = space.h.get();
    const int64_t group = spec_.group_columns(last);
    for (int64_t start = rows.start; start < rows.stop; start += kBlock) {
      const Range block{start, std::min(rows.stop, start + kBlock)};
      for (int64_t c = 0; c < columns; c += group) {
        of_tiles_.hidden(tile(last, block, {c, std::min(columns, c + group)}), h + c, columns);
      }
      if (spec_.output_layer) {
        of_tiles_.logits(block.size(), width, n_experts, h, columns, params_.out_weight, params_.out_bias,
                         out_ + start * n_experts, n_experts);
      } else {
        std::vector<float*> to(spec_.gates.size());
        for (size_t g = 0; g < to.size(); ++g) to[g] = out_ + (static_cast<int64_t>(g) * tiles_.rows + start) * width;
        of_tiles_.mix(spec_.gates.data(), spec_.n_gates(), block.size(), width,
                      saved_.weights + start * spec_.gate_columns, spec_.gate_columns, h, columns, to.data(), width);
      }
    }
  }

  const Runtime& runtime_;
  const Kernels& kernels_;
  const TileKernels<T>& of_tiles_;
  const ExpertGateLayer& spec_;
  const ExpertGateParams& params_;
  const Inputs x_;
  const Tiles tiles_;
  const bool batch_statistics_;
  const double dropout_;
  const int64_t seed_;
  const ExpertGateSaved<T>& saved_;
  float* const out_;
  const SmallInputs* const small_;
  // of each hidden layer, then of the gates
  std::vector<ColumnFactors> factors_;
  std::vector<Partials> partials_;
  std::unique_ptr<PackedWeights<T>> packed_;
  std::unique_ptr<SmallSums> sums_;
};

}  // namespace fastmtl
