// expert_gate backward. One phase over the tiles a layer, last to first: finish dz of the layer above (whose sums are
// now known), GEMM it to dh, turn that into dy and sum it. Then one phase over dx, and one over all weights' gradients
// together, cut by rows of the weights. h is computed again from z. Layout, threading, determinism:
// expert_gate.h.
#pragma once

#include "core/expert_gate.h"
#include "core/expert_gate_products.h"

namespace fastmtl {

// Output gradient: pointers to each of its G or E matrices [B, H], or to the one [B, E].
struct OutputGrad {
  const float* data;
  int64_t matrix_stride, row_stride;
  const float* at(int64_t matrix, int64_t row) const { return data + matrix * matrix_stride + row * row_stride; }
};

template <class Runtime>
class ExpertGateBackward {
 public:
  // dx is [N, B, I] dense, or null where it is not wanted.
  ExpertGateBackward(const Runtime& runtime, const ExpertGateLayer& spec, const ExpertGateParams& params, Inputs x,
                     int64_t n_rows, bool training, double dropout, int64_t seed, const ExpertGateSaved& saved,
                     OutputGrad dout, const ExpertGateGrads& grads, float* dx)
      : runtime_(runtime),
        kernels_(best_kernels()),
        spec_(spec),
        params_(params),
        x_(x),
        tiles_(n_rows),
        batch_statistics_(training && n_rows > 1),
        dropout_(training ? dropout : 0),
        seed_(seed),
        saved_(saved),
        dout_(dout),
        grads_(grads),
        dx_(dx) {}

  void run() {
    const int64_t depth = spec_.depth();
    for (int64_t l = 0; l < depth; ++l) {
      factors_.push_back(hidden_factors(spec_, params_, saved_, l));
      layers_.emplace_back(tiles_, spec_.columns(l), params_.alpha[l] != nullptr, l + 1 < depth, bf16());
    }
    if (has_gates()) {
      factors_.emplace_back(saved_.gate, params_.gate, spec_.gate_columns);
      layers_.emplace_back(tiles_, spec_.gate_columns, false, false, bf16());
      list_mixers();
    }
    if (bf16()) packed_ = std::make_unique<PackedWeights>(spec_, params_, true);
    const PackedInputs inputs(spec_, saved_, bf16() ? tiles_.rows : 0);
    for (ColumnFactors& factors : factors_) factors.fill(factors.all());
    const int64_t out_columns =
        spec_.output_layer ? spec_.n_experts * (1 + (depth ? spec_.dims[depth - 1] : spec_.in_features)) : 0;
    out_sums_.assign(static_cast<size_t>(tiles_.count * out_columns), 0.0);
    const std::vector<WeightTask> weights = weight_tasks();

    runtime_.team(2 * depth + 4, tiles_.count, 2 * tiles_.rows * spec_.row_work(), [&](Phases::Worker& worker) {
      const int64_t packing = bf16() ? packed_->count() + inputs.count() : 0;
      worker.run(packing, [&](int64_t i) {
        if (i < inputs.count()) return inputs.pack(i);
        packed_->pack(i - inputs.count());
      });
      worker.run(tiles_.count, [&](int64_t tile) { part(tile, tiles_.at(tile)); });
      worker.run(has_gates() + (out_columns > 0), [&](int64_t) {
        if (has_gates()) return finish_norm(depth, factors_[depth].all());
        finish_output(out_columns);
      });
      for (int64_t l = depth - 1; l >= 0; --l) {
        worker.run(n_pieces(spec_.columns(l)),
                   [&](int64_t piece) { finish_norm(l, piece_of(factors_[l].all(), piece)); });
        worker.run(tiles_.count, [&](int64_t tile) {
          if (l > 0) return step_down(l, tile, tiles_.at(tile));
          first_layer(tiles_.at(tile));
        });
      }
      worker.run(static_cast<int64_t>(weights.size()), [&](int64_t i) { weight_gradient(weights[i], inputs); });
    });
    for (int64_t l = 0; l < depth; ++l) finish_alpha(l);
  }

 private:
  // dy, then dz, of one BatchNorm, and each tile's sums.
  struct LayerGrad {
    int64_t columns, ld, n_sums, ld_near;
    bool keeps_h;
    Scratch dz, h;                       // h: input of the next layer, for its weights' gradient
    Bf16Scratch dz_near, h_near;         // the same in bf16, where the layer computes in it: then h is not kept in fp32
    std::vector<double> sums;            // [tiles, n_sums, columns]
    std::vector<double> mean_dy, slope;  // see Kernels::linear_grad
    LayerGrad(const Tiles& tiles, int64_t n, bool learned, bool keep_h, bool bf16)
        : columns(n),
          ld(row_stride(n)),
          n_sums(learned ? 3 : 2),
          ld_near(bf16_stride(n)),
          keeps_h(keep_h && !bf16),
          dz(tiles.rows * ld),
          h(keeps_h ? tiles.rows * ld : 0),
          dz_near(bf16 ? tiles.rows * ld_near : 0),
          h_near(keep_h && bf16 ? tiles.rows * ld_near : 0),
          sums(static_cast<size_t>(tiles.count * n_sums * n)),
          mean_dy(static_cast<size_t>(n)),
          slope(static_cast<size_t>(n)) {}
    float* at(int64_t row, int64_t column) const { return dz.get() + row * ld + column; }
    Bf16* near_at(int64_t row, int64_t column) const { return dz_near.get() + row * ld_near + column; }
    float* h_at(int64_t row, int64_t column) const { return keeps_h ? h.get() + row * ld + column : nullptr; }
    GradSums sums_of(int64_t tile, int64_t column) {
      double* first = sums.data() + tile * n_sums * columns + column;
      return {first, first + columns, n_sums == 3 ? first + 2 * columns : nullptr};
    }
    double total(int64_t which, int64_t column, int64_t tiles) const {
      double sum = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[(tile * n_sums + which) * columns + column];
      return sum;
    }
  };

  // The bf16 inputs, packed for the gradient of the weights that read them.
  class PackedInputs {
   public:
    PackedInputs(const ExpertGateLayer& spec, const ExpertGateSaved& saved, int64_t n_rows)
        : saved_(saved),
          features_(spec.in_features),
          rows_(n_rows),
          inputs_(n_rows ? spec.n_inputs : 0),
          packed_(inputs_ * packed_bf16_size(features_, rows_)) {}
    int64_t count() const { return inputs_ * n_pieces(features_); }
    void pack(int64_t index) const {
      const int64_t n = index / n_pieces(features_);
      const Range columns = piece_of({0, features_}, index % n_pieces(features_));
      best_packed_gemm().repack_bf16(columns.size(), rows_, saved_.x + n * rows_ * saved_.ld_x + columns.start,
                                     saved_.ld_x, true, at(n) + columns.start * round_up(rows_, kPairDepth));
    }
    Bf16* at(int64_t n) const { return packed_.get() + n * packed_bf16_size(features_, rows_); }

   private:
    const ExpertGateSaved& saved_;
    const int64_t features_, rows_, inputs_;
    const Bf16Scratch packed_;
  };

  bool bf16() const { return saved_.x != nullptr; }
  bool has_gates() const { return !spec_.gates.empty(); }
  LayerGrad& gate_grad() { return layers_[spec_.depth()]; }
  const ColumnFactors& gate_factors() const { return factors_[spec_.depth()]; }

  Tile tile(int64_t l, Range rows, Range columns) const {
    return tile_of(saved_.hidden[l], factors_[l], rows, columns, spec_.dims[l], spec_.activation,
                   dropout_of(dropout_, seed_, l), tiles_.rows < kFewRows);
  }
  Tile gate_tile(Range rows) const {
    return tile_of(saved_.gate, gate_factors(), rows, {0, spec_.gate_columns}, 1, kLinear, Dropout{},
                   tiles_.rows < kFewRows);
  }

  void list_mixers() {
    starts_.assign(1, 0);
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      for (size_t g = 0; g < spec_.gates.size(); ++g) {
        for (int64_t k = 0; k < spec_.gates[g].fan_in; ++k) {
          if (spec_.gates[g].experts[k] != e) continue;
          mixers_.push_back(static_cast<int64_t>(g));
          mixers_.push_back(spec_.gates[g].column + k);
        }
      }
      starts_.push_back(static_cast<int64_t>(mixers_.size()) / 2);
    }
  }

  // From the result back to dy of the last hidden layer and of the gates.
  void part(int64_t tile_index, Range rows) {
    const int64_t last = spec_.depth() - 1, n_experts = spec_.n_experts;
    if (last < 0) return part_inputs(tile_index, rows);
    LayerGrad& grad = layers_[last];
    const int64_t width = spec_.dims[last], columns = spec_.columns(last);
    if (!spec_.output_layer && spec_.gates.empty()) {
      for (int64_t e = 0; e < n_experts; ++e) {
        kernels_.hidden_grad(tile(last, rows, {e * width, (e + 1) * width}), dout_.at(e, rows.start), dout_.row_stride,
                             grad.at(rows.start, e * width), grad.ld, grad.sums_of(tile_index, e * width), nullptr, 0);
      }
      return;
    }
    const Scratch h(kBlock * columns);
    for (int64_t start = rows.start; start < rows.stop; start += kBlock) {
      const Range block{start, std::min(rows.stop, start + kBlock)};
      const Tile t = tile(last, block, {0, columns});
      float* dh = grad.at(start, 0);
      kernels_.hidden(t, h.get(), columns);
      if (spec_.output_layer) {
        double* sums = out_sums_.data() + tile_index * n_experts * (width + 1);
        kernels_.logits_grad(block.size(), width, n_experts, h.get(), columns, params_.out_weight, dout_.at(0, start),
                             dout_.row_stride, dh, grad.ld, sums, sums + columns);
      } else {
        std::vector<const float*> from(spec_.gates.size());
        for (size_t g = 0; g < from.size(); ++g) from[g] = dout_.at(static_cast<int64_t>(g), start);
        kernels_.mix_grad(spec_.gates.data(), spec_.n_gates(), block.size(), width, n_experts, starts_.data(),
                          mixers_.data(), saved_.weights + start * spec_.gate_columns, spec_.gate_columns, h.get(),
                          columns, from.data(), dout_.row_stride, dh, grad.ld, gate_grad().at(start, 0),
                          gate_grad().ld);
      }
      kernels_.hidden_grad(t, dh, grad.ld, dh, grad.ld, grad.sums_of(tile_index, 0), nullptr, 0);
    }
    if (has_gates()) {
      LayerGrad& gate = gate_grad();
      float* ds = gate.at(rows.start, 0);
      kernels_.hidden_grad(gate_tile(rows), ds, gate.ld, ds, gate.ld, gate.sums_of(tile_index, 0), nullptr, 0);
    }
  }

  // An output layer straight on the inputs.
  void part_inputs(int64_t tile_index, Range rows) {
    const int64_t width = spec_.in_features, n_experts = spec_.n_experts;
    const Scratch dh(rows.size() * width);
    double* sums = out_sums_.data() + tile_index * n_experts * (width + 1);
    for (int64_t n = 0; n < spec_.n_inputs; ++n) {
      float* to = dx_ ? dx_ + (n * tiles_.rows + rows.start) * width : nullptr;
      if (to) std::fill_n(to, rows.size() * width, 0.0f);
      for (int64_t e = spec_.experts_of[n].start; e < spec_.experts_of[n].stop; ++e) {
        kernels_.logits_grad(rows.size(), width, 1, x_.at(n, rows.start), x_.row_stride, params_.out_weight + e * width,
                             dout_.at(0, rows.start) + e, dout_.row_stride, dh.get(), width, sums + e * width,
                             sums + n_experts * width + e);
        for (int64_t i = 0; to && i < rows.size() * width; ++i) to[i] += dh.get()[i];
      }
    }
  }

  void finish_output(int64_t out_columns) {
    const int64_t weights = out_columns - spec_.n_experts;
    for (int64_t c = 0; c < out_columns; ++c) {
      double sum = 0;
      for (int64_t tile = 0; tile < tiles_.count; ++tile) sum += out_sums_[tile * out_columns + c];
      (c < weights ? grads_.out_weight[c] : grads_.out_bias[c - weights]) = static_cast<float>(sum);
    }
  }

  // Norms are counted through the hidden layers, the gates' is last.
  void finish_norm(int64_t norm, Range columns) {
    LayerGrad& grad = layers_[norm];
    const ColumnFactors& factors = factors_[norm];
    const LinearNormGrads& to = norm < spec_.depth() ? grads_.hidden[norm] : grads_.gate;
    const double n_rows = static_cast<double>(std::max<int64_t>(1, tiles_.rows));
    for (int64_t c = columns.start; c < columns.stop; ++c) {
      const double dy = grad.total(0, c, tiles_.count),
                   rstd = static_cast<double>(factors.rstd[c]) + static_cast<double>(factors.rstd_rest[c]);
      const double rest = static_cast<double>(factors.mean_rest[c]);
      const double dy_xhat = rstd * (grad.total(1, c, tiles_.count) - rest * dy);
      to.beta[c] = static_cast<float>(dy);
      to.gamma[c] = static_cast<float>(dy_xhat);
      // the batch mean cancels a bias in front of it
      to.bias[c] = batch_statistics_ ? 0.0f : static_cast<float>(dy * static_cast<double>(factors.scale[c]));
      grad.slope[c] = rstd * dy_xhat / n_rows;
      grad.mean_dy[c] = dy / n_rows - rest * grad.slope[c];
    }
  }

  void finish_alpha(int64_t l) {
    if (!params_.alpha[l]) return;
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      double sum = 0;
      for (int64_t j = 0; j < spec_.dims[l]; ++j) sum += layers_[l].total(2, e * spec_.dims[l] + j, tiles_.count);
      grads_.alpha[l][e] = static_cast<float>(sum);
    }
  }

  // dy to dz: in place, or in bf16 for the products.
  void finish_dz(const Tile& t, LayerGrad& grad, Range rows, int64_t column) {
    const double* mean_dy = batch_statistics_ ? grad.mean_dy.data() + column : nullptr;
    const double* slope = batch_statistics_ ? grad.slope.data() + column : nullptr;
    float* dy = grad.at(rows.start, column);
    if (bf16()) {
      kernels_.linear_grad_bf16(t, dy, grad.ld, mean_dy, slope, grad.near_at(rows.start, column), grad.ld_near);
    } else {
      kernels_.linear_grad(t, dy, grad.ld, mean_dy, slope, dy, grad.ld);
    }
  }

  // dy of layer l to dz, and on to dy of layer l - 1.
  void step_down(int64_t l, int64_t tile_index, Range rows) {
    LayerGrad &above = layers_[l], &below = layers_[l - 1];
    const int64_t width = spec_.dims[l], fan_in = spec_.fan_in(l);
    const Scratch h(bf16() ? rows.size() * fan_in : 0);
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      finish_dz(tile(l, rows, {e * width, (e + 1) * width}), above, rows, e * width);
      float* dh = below.at(rows.start, e * fan_in);
      const Tile t = tile(l - 1, rows, {e * fan_in, (e + 1) * fan_in});
      const GradSums sums = below.sums_of(tile_index, e * fan_in);
      if (bf16()) {
        product_near(above, l, rows, {e * width, (e + 1) * width}, fan_in, dh, below.ld, false);
        kernels_.hidden_grad(t, dh, below.ld, dh, below.ld, sums, h.get(), fan_in);
        best_packed_gemm().round_bf16(rows.size(), fan_in, h.get(), fan_in,
                                      below.h_near.get() + rows.start * below.ld_near + e * fan_in, below.ld_near);
      } else {
        runtime_.gemm(rows.size(), fan_in, width, above.at(rows.start, e * width), above.ld, false,
                      params_.hidden[l].weight + e * width * fan_in, fan_in, false, dh, below.ld, false);
        kernels_.hidden_grad(t, dh, below.ld, dh, below.ld, sums, below.h_at(rows.start, e * fan_in), below.ld);
      }
    }
  }

  // to [rows, fan_in] = dz W in bf16.
  void product_near(const LayerGrad& grad, int64_t norm, Range rows, Range columns, int64_t fan_in, float* to,
                    int64_t ld_to, bool accumulate) const {
    best_packed_gemm().gemm_bf16(rows.size(), fan_in, columns.size(), grad.near_at(rows.start, columns.start),
                                 grad.ld_near, packed_->at(norm, columns.start), to, ld_to, accumulate);
  }

  void first_layer(Range rows) {
    const int64_t width = spec_.dims[0], fan_in = spec_.in_features;
    if (has_gates()) finish_dz(gate_tile(rows), gate_grad(), rows, 0);
    for (int64_t n = 0; n < spec_.n_inputs; ++n) {
      const Range experts{spec_.experts_of[n].start * width, spec_.experts_of[n].stop * width};
      float* to = dx_ ? dx_ + (n * tiles_.rows + rows.start) * fan_in : nullptr;
      bool begun = false;
      const auto send = [&](int64_t norm, Range columns, const float* weight) {
        if (!to || columns.size() == 0) return;
        const LayerGrad& grad = layers_[norm];
        if (bf16()) {
          product_near(grad, norm, rows, columns, fan_in, to, fan_in, begun);
          begun = true;
          return;
        }
        runtime_.gemm(rows.size(), fan_in, columns.size(), grad.at(rows.start, columns.start), grad.ld, false,
                      weight + columns.start * fan_in, fan_in, false, to, fan_in, begun);
        begun = true;
      };
      for (int64_t p = 0; p < n_pieces(experts.size()); ++p) {
        const Range piece = piece_of(experts, p);
        finish_dz(tile(0, rows, piece), layers_[0], rows, piece.start);
        send(0, piece, params_.hidden[0].weight);
      }
      if (has_gates()) send(spec_.depth(), spec_.gate_columns_of[n], params_.gate.weight);
      if (to && !begun) std::fill_n(to, rows.size() * fan_in, 0.0f);
    }
  }

  // Some rows of a weight's gradient = dz[:, columns]^T h over the whole batch; h is what the layer below kept from
  // column `from` on, or without such a layer the input `from`.
  struct WeightTask {
    const LayerGrad *grad, *below;
    Range columns;
    int64_t from, fan_in;
    float* to;
  };

  std::vector<WeightTask> weight_tasks() {
    std::vector<WeightTask> tasks;
    const auto add = [&](const LayerGrad& grad, Range columns, const LayerGrad* below, int64_t from, int64_t fan_in,
                         float* weight) {
      // about eight pieces, not so small that a product reads (in bf16: packs) h more than it multiplies
      const int64_t least = bf16() && below ? 256 : 64;
      const int64_t piece = std::clamp<int64_t>((columns.size() / 8 + 15) / 16 * 16, least, 256);
      for (int64_t c = columns.start; c < columns.stop; c += piece) {
        tasks.push_back({&grad, below, {c, std::min(columns.stop, c + piece)}, from, fan_in, weight + c * fan_in});
      }
    };
    for (int64_t l = spec_.depth() - 1; l > 0; --l) {
      for (int64_t e = 0; e < spec_.n_experts; ++e) {
        add(layers_[l], {e * spec_.dims[l], (e + 1) * spec_.dims[l]}, &layers_[l - 1], e * spec_.fan_in(l),
            spec_.fan_in(l), grads_.hidden[l].weight);
      }
    }
    for (int64_t n = 0; spec_.depth() && n < spec_.n_inputs; ++n) {
      const Range experts = spec_.experts_of[n];
      add(layers_[0], {experts.start * spec_.dims[0], experts.stop * spec_.dims[0]}, nullptr, n, spec_.in_features,
          grads_.hidden[0].weight);
      if (has_gates()) {
        add(gate_grad(), spec_.gate_columns_of[n], nullptr, n, spec_.in_features, grads_.gate.weight);
      }
    }
    return tasks;
  }

  void weight_gradient(const WeightTask& t, const PackedInputs& inputs) const {
    const int64_t n = t.columns.size(), n_rows = tiles_.rows;
    if (!bf16()) {
      const float* h = t.below ? t.below->h_at(0, t.from) : x_.at(t.from, 0);
      runtime_.gemm(n, t.fan_in, n_rows, t.grad->at(0, t.columns.start), t.grad->ld, true, h,
                    t.below ? t.below->ld : x_.row_stride, false, t.to, t.fan_in, false);
      return;
    }
    const PackedGemm& gemm = best_packed_gemm();
    const Bf16* dz = t.grad->near_at(0, t.columns.start);
    if (t.below) {
      const Bf16Scratch scratch(wgrad_scratch_size(n_rows, n, t.fan_in));
      gemm.wgrad_bf16(n_rows, n, t.fan_in, dz, t.grad->ld_near, t.below->h_near.get() + t.from, t.below->ld_near, t.to,
                      t.fan_in, false, scratch.get());
      return;
    }
    const int64_t ld = bf16_stride(n_rows);
    const Bf16Scratch transposed(n * ld);
    gemm.transpose_bf16(n_rows, n, dz, t.grad->ld_near, transposed.get(), ld);
    gemm.gemm_bf16(n, t.fan_in, n_rows, transposed.get(), ld, inputs.at(t.from), t.to, t.fan_in, false);
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
  const OutputGrad dout_;
  const ExpertGateGrads& grads_;
  float* const dx_;
  // of each hidden layer, then of the gates
  std::vector<ColumnFactors> factors_;
  std::vector<LayerGrad> layers_;
  std::unique_ptr<PackedWeights> packed_;  // null: fp32
  std::vector<int64_t> starts_, mixers_;
  std::vector<double> out_sums_;
};

}  // namespace fastmtl
