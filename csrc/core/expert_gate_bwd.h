// expert_gate backward. One phase over the tiles a layer, last to first: finish dz of the layer above (whose sums are
// now known), GEMM it to dh, turn that into dy and sum it. Then one phase over dx, and one over all weights' gradients
// together, cut by rows of the weights, beside which folded tables have theirs. h is computed again from z. Layout,
// threading, determinism: expert_gate.h.
#pragma once

#include "core/expert_gate.h"
#include "core/expert_gate_grads.h"
#include "core/expert_gate_products.h"
#include "core/expert_gate_small.h"

namespace fastmtl {

template <class T, class Runtime>
class ExpertGateBackward {
 public:
  // dx is [N, B, dx_columns] dense, the first columns of x, or null where it is not wanted. small: see
  // expert_gate_small.h, and dsmall the gradients of its tables; both may be null.
  ExpertGateBackward(const Runtime& runtime, const ExpertGateLayer& spec, const ExpertGateParams& params, Inputs x,
                     int64_t n_rows, bool training, double dropout, int64_t seed, const ExpertGateSaved<T>& saved,
                     OutputGrad dout, const ExpertGateGrads& grads, float* dx, int64_t dx_columns,
                     const SmallInputs* small, float* dsmall)
      : runtime_(runtime),
        kernels_(best_kernels()),
        of_tiles_(best_tile_kernels<T>()),
        in_f32_(best_tile_kernels<float>()),
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
        dx_(dx),
        dx_columns_(dx_columns),
        small_(small),
        gate_memory_(n_rows * row_stride<float>(spec.gate_columns)),
        gate_dz_(gate_memory_.get(), n_rows, std::max<int64_t>(1, spec.gate_columns)),
        gate_memory_near_(kBf16 ? n_rows * row_stride<Bf16>(spec.gate_columns) : 0),
        gate_near_(gate_memory_near_.get(), n_rows, std::max<int64_t>(1, spec.gate_columns)) {
    if (small) of_small_ = std::make_unique<SmallGrads>(spec, params, grads, *small, n_rows, dsmall);
  }

  void run() {
    const int64_t depth = spec_.depth();
    for (int64_t l = 0; l < depth; ++l) {
      factors_.push_back(hidden_factors(spec_, params_, saved_, l));
      sums_.emplace_back(tiles_, spec_.columns(l), params_.alpha[l] != nullptr);
      layers_.emplace_back(tiles_.rows, spec_.columns(l), spec_.group_columns(l));
    }
    if (has_gates()) {
      factors_.emplace_back(saved_.gate, params_.gate, spec_.gate_columns);
      sums_.emplace_back(tiles_, spec_.gate_columns, false);
      list_mixers();
    }
    packed_ = std::make_unique<PackedWeights<T>>(spec_, params_, tiles_.most(), dx_columns_, small_);
    const PackedInputs<T> inputs(spec_, saved_, kBf16 && depth ? tiles_.rows : 0);
    for (ColumnFactors& factors : factors_) factors.fill(factors.all());
    const int64_t out_columns =
        spec_.output_layer ? spec_.n_experts * (1 + (depth ? spec_.dims[depth - 1] : spec_.in_features)) : 0;
    out_sums_.assign(static_cast<size_t>(tiles_.count * out_columns), 0.0);
    const std::vector<WeightTask> weights = weight_tasks();

    runtime_.team(2 * depth + 4, tiles_.count, 2 * tiles_.rows * spec_.row_work(), [&](Phases::Worker& worker) {
      const Space space(spec_, tiles_, small_);
      worker.run(packed_->count() + inputs.count(), [&](int64_t i) {
        if (i < inputs.count()) return inputs.pack(i);
        packed_->pack(i - inputs.count());
      });
      worker.run(tiles_.count, [&](int64_t i) {
        const int64_t tile = tiles_.in_turn(i, depth + 1);
        part(tile, tiles_.at(tile), space);
      });
      worker.run(has_gates() + (out_columns > 0), [&](int64_t) {
        if (has_gates()) return finish_norm(depth, factors_[depth].all());
        finish_output(out_columns);
      });
      for (int64_t l = depth - 1; l >= 0; --l) {
        worker.run(n_pieces(spec_.columns(l)),
                   [&](int64_t piece) { finish_norm(l, piece_of(factors_[l].all(), piece)); });
        worker.run(tiles_.count, [&](int64_t i) {
          const int64_t tile = tiles_.in_turn(i, 2 * depth + 1 - l);
          if (l > 0) return step_down(l, tile, tiles_.at(tile), space);
          first_layer(tiles_.at(tile));
        });
      }
      const int64_t n_weights = static_cast<int64_t>(weights.size());
      worker.run(n_weights + (of_small_ ? of_small_->count() : 0), [&](int64_t i) {
        if (i < n_weights) return weight_gradient(weights[i], inputs, space);
        small_gradient(i - n_weights, space);
      });
    });
    if (of_small_) of_small_->finish();
    for (int64_t l = 0; l < depth; ++l) finish_alpha(l);
  }

 private:
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  // A thread's own memory, which stays in its cache from tile to tile.
  struct Space {
    Scratch<T> h;         // of all columns of a block, or of an expert and a stretch of rows
    Scratch<float> dh;    // of the same, or of a tile and an expert
    Scratch<T> operands;  // of a weight's gradient in bf16
    // where tables are folded: a weight's gradient without their columns, and the sums for theirs
    Scratch<float> kept, sums;
    Space(const ExpertGateLayer& spec, const Tiles& tiles, const SmallInputs* small)
        : h(h_size(spec, tiles)),
          dh(dh_size(spec, tiles)),
          operands(operands_size(spec, tiles)),
          kept(small ? kPiece * spec.in_features : 0),
          sums(small ? SmallGrads::scratch_size(small->tables) : 0) {}
    static int64_t block_size(const ExpertGateLayer& spec) {
      return spec.depth() ? kBlock * spec.columns(spec.depth() - 1) : 0;
    }
    static int64_t h_size(const ExpertGateLayer& spec, const Tiles& tiles) {
      int64_t size = block_size(spec);
      const int64_t rows = std::min(kStretchRows, tiles.rows);
      for (int64_t l = 1; l < spec.depth(); ++l) size = std::max(size, rows * row_stride<T>(spec.fan_in(l)));
      return size;
    }
    static int64_t dh_size(const ExpertGateLayer& spec, const Tiles& tiles) {
      int64_t size = spec.depth() ? block_size(spec) : tiles.height * spec.in_features;
      for (int64_t l = 1; l < spec.depth(); ++l)
        size = std::max(size, tiles.height * row_stride<float>(spec.fan_in(l)));
      return size;
    }
    static int64_t operands_size(const ExpertGateLayer& spec, const Tiles& tiles) {
      int64_t size = 0;
      for (int64_t l = 0; kBf16 && l < spec.depth(); ++l) {
        size = std::max(size, wgrad_scratch_size(tiles.rows, kPiece, spec.fan_in(l)));
      }
      return size;
    }
  };

  bool has_gates() const { return !spec_.gates.empty(); }
  NormSums& gate_sums() { return sums_[spec_.depth()]; }

  Tile<T> tile(int64_t l, Range rows, Range columns) const {
    return tile_of(saved_.z[l], factors_[l], rows, columns, spec_.dims[l], spec_.activation,
                   dropout_of(dropout_, seed_, l), tiles_.rows < kFewRows);
  }
  Tile<float> gate_tile(Range rows) const {
    return tile_of(saved_.gate_z, factors_[spec_.depth()], rows, {0, spec_.gate_columns}, 1, kLinear, Dropout{},
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
  void part(int64_t tile_index, Range rows, const Space& space) {
    const int64_t last = spec_.depth() - 1, n_experts = spec_.n_experts;
    if (last < 0) return part_inputs(tile_index, rows, space.dh.get());
    const Grouped<T>& dy = layers_[last].dz;
    const int64_t width = spec_.dims[last], columns = spec_.columns(last);
    if (!spec_.output_layer && spec_.gates.empty()) {
      for (int64_t e = 0; e < n_experts; ++e) {
        of_tiles_.hidden_grad(tile(last, rows, {e * width, (e + 1) * width}), dout_.at(e, rows.start), dout_.row_stride,
                              dy.at(rows.start, e * width), dy.ld, sums_[last].of(tile_index, e * width));
      }
      return;
    }
    T* h = space.h.get();
    float* dh = space.dh.get();
    const int64_t group = spec_.group_columns(last);
    for (int64_t start = rows.start; start < rows.stop; start += kBlock) {
      const Range block{start, std::min(rows.stop, start + kBlock)};
      const auto by_groups = [&](const auto& f) {
        for (int64_t c = 0; c < columns; c += group) f(tile(last, block, {c, std::min(columns, c + group)}), c);
      };
      by_groups([&](const Tile<T>& t, int64_t c) { of_tiles_.hidden(t, h + c, columns); });
      if (spec_.output_layer) {
        double* sums = out_sums_.data() + tile_index * n_experts * (width + 1);
        of_tiles_.logits_grad(block.size(), width, n_experts, h, columns, params_.out_weight, dout_.at(0, start),
                              dout_.row_stride, dh, columns, sums, sums + columns);
      } else {
        std::vector<const float*> from(spec_.gates.size());
        for (size_t g = 0; g < from.size(); ++g) from[g] = dout_.at(static_cast<int64_t>(g), start);
        of_tiles_.mix_grad(spec_.gates.data(), spec_.n_gates(), block.size(), width, n_experts, starts_.data(),
                           mixers_.data(), saved_.weights + start * spec_.gate_columns, spec_.gate_columns, h, columns,
                           from.data(), dout_.row_stride, dh, columns, gate_dz_.at(start, 0), gate_dz_.ld);
      }
      by_groups([&](const Tile<T>& t, int64_t c) {
        of_tiles_.hidden_grad(t, dh + c, columns, dy.at(start, c), dy.ld, sums_[last].of(tile_index, c));
      });
    }
    if (has_gates()) {
      float* ds = gate_dz_.at(rows.start, 0);
      in_f32_.hidden_grad(gate_tile(rows), ds, gate_dz_.ld, ds, gate_dz_.ld, gate_sums().of(tile_index, 0));
    }
  }

  // An output layer straight on the inputs.
  void part_inputs(int64_t tile_index, Range rows, float* dh) {
    const int64_t width = spec_.in_features, n_experts = spec_.n_experts;
    double* sums = out_sums_.data() + tile_index * n_experts * (width + 1);
    for (int64_t n = 0; n < spec_.n_inputs; ++n) {
      float* to = dx_ ? dx_ + (n * tiles_.rows + rows.start) * width : nullptr;
      if (to) std::fill_n(to, rows.size() * width, 0.0f);
      for (int64_t e = spec_.experts_of[n].start; e < spec_.experts_of[n].stop; ++e) {
        in_f32_.logits_grad(rows.size(), width, 1, x_.at(n, rows.start), x_.row_stride, params_.out_weight + e * width,
                            dout_.at(0, rows.start) + e, dout_.row_stride, dh, width, sums + e * width,
                            sums + n_experts * width + e);
        for (int64_t i = 0; to && i < rows.size() * width; ++i) to[i] += dh[i];
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
    NormSums& grad = sums_[norm];
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
      for (int64_t j = 0; j < spec_.dims[l]; ++j) sum += sums_[l].total(2, e * spec_.dims[l] + j, tiles_.count);
      grads_.alpha[l][e] = static_cast<float>(sum);
    }
  }

  // dy to dz of some columns of a layer, in place.
  void finish_dz(int64_t l, Range rows, Range columns) {
    const Grouped<T>& dz = layers_[l].dz;
    T* at = dz.at(rows.start, columns.start);
    of_tiles_.linear_grad(tile(l, rows, columns), at, dz.ld, mean_dy(l, columns.start), slope(l, columns.start), at,
                          dz.ld);
  }
  // What finish_dz reads.
  void want(Ahead& ahead, int64_t l, Range rows, Range columns) const {
    ahead.add(part_of(saved_.z[l], rows, columns));
    ahead.add(part_of(layers_[l].dz, rows, columns));
  }
  void finish_gate_dz(Range rows) {
    float* at = gate_dz_.at(rows.start, 0);
    const int64_t norm = spec_.depth();
    in_f32_.linear_grad(gate_tile(rows), at, gate_dz_.ld, mean_dy(norm, 0), slope(norm, 0), at, gate_dz_.ld);
    if constexpr (kBf16) {
      best_packed_gemm().round_bf16(rows.size(), spec_.gate_columns, at, gate_dz_.ld, gate_near_.at(rows.start, 0),
                                    gate_near_.ld);
    }
  }
  const double* mean_dy(int64_t norm, int64_t column) const {
    return batch_statistics_ ? sums_[norm].mean_dy.data() + column : nullptr;
  }
  const double* slope(int64_t norm, int64_t column) const {
    return batch_statistics_ ? sums_[norm].slope.data() + column : nullptr;
  }

  // dz of a norm as products read it.
  const Grouped<T>& operand(int64_t norm) const {
    if (norm < spec_.depth()) return layers_[norm].dz;
    if constexpr (kBf16) {
      return gate_near_;
    } else {
      return gate_dz_;
    }
  }

  // to [rows, fan_in] = dz W; of the inputs' columns the first dx_columns.
  void multiply(int64_t norm, Range rows, Range columns, float* to, int64_t ld, bool accumulate,
                const Ahead& ahead) const {
    const bool gate = norm == spec_.depth();
    const int64_t fan_in = gate ? spec_.in_features : spec_.fan_in(norm);
    const int64_t n = gate || norm == 0 ? dx_columns_ : fan_in;
    const Grouped<T>& dz = operand(norm);
    if constexpr (kBf16) {
      best_packed_gemm().gemm_bf16(rows.size(), n, columns.size(), dz.at(rows.start, columns.start), dz.ld,
                                   packed_->at(norm, columns.start), to, ld, accumulate, &ahead);
    } else if (is_small(tiles_.most(), columns.size(), fan_in)) {
      kernels_.small_gemm(rows.size(), n, columns.size(), dz.at(rows.start, columns.start), dz.ld, false,
                          packed_->plain(norm, columns.start), fan_in, false, to, ld, accumulate,
                          tiles_.most() < kFewRows);
    } else {
      best_packed_gemm().gemm_f32(rows.size(), n, columns.size(), dz.at(rows.start, columns.start), dz.ld,
                                  packed_->at(norm, columns.start), to, ld, accumulate, &ahead);
    }
  }

  // dy of layer l to dz, and on to dy of layer l - 1.
  void step_down(int64_t l, int64_t tile_index, Range rows, const Space& space) {
    const LayerGrad<T>& below = layers_[l - 1];
    const int64_t width = spec_.dims[l], fan_in = spec_.fan_in(l);
    const int64_t ld = row_stride<float>(fan_in);
    float* dh = space.dh.get();
    for (int64_t e = 0; e < spec_.n_experts; ++e) {
      const int64_t column = e * fan_in;
      finish_dz(l, rows, {e * width, (e + 1) * width});
      Ahead ahead;
      ahead.add(part_of(saved_.z[l - 1], rows, {column, column + fan_in}));
      ahead.add(part_of(below.dz, rows, {column, column + fan_in}));
      if (e + 1 < spec_.n_experts) want(ahead, l, rows, {(e + 1) * width, (e + 2) * width});
      multiply(l, rows, {e * width, (e + 1) * width}, dh, ld, false, ahead);
      of_tiles_.hidden_grad(tile(l - 1, rows, {column, column + fan_in}), dh, ld, below.dz.at(rows.start, column),
                            below.dz.ld, sums_[l - 1].of(tile_index, column));
    }
  }

  void first_layer(Range rows) {
    const int64_t width = spec_.dims[0];
    if (has_gates()) finish_gate_dz(rows);
    for (int64_t n = 0; n < spec_.n_inputs; ++n) {
      const Range experts{spec_.experts_of[n].start * width, spec_.experts_of[n].stop * width};
      float* to = dx_ ? dx_ + (n * tiles_.rows + rows.start) * dx_columns_ : nullptr;
      bool begun = false;
      const auto send = [&](int64_t norm, Range columns, const Ahead& ahead) {
        if (!to || columns.size() == 0) return;
        multiply(norm, rows, columns, to, dx_columns_, begun, ahead);
        begun = true;
      };
      const std::vector<Range> pieces = pieces_of(experts, spec_.group_columns(0));
      for (size_t p = 0; p < pieces.size(); ++p) {
        finish_dz(0, rows, pieces[p]);
        Ahead ahead;
        if (p + 1 < pieces.size()) want(ahead, 0, rows, pieces[p + 1]);
        send(0, pieces[p], ahead);
      }
      if (has_gates()) send(spec_.depth(), spec_.gate_columns_of[n], Ahead{});
      if (to && !begun) std::fill_n(to, rows.size() * dx_columns_, 0.0f);
    }
  }

  // Some rows of a weight's gradient = dz[:, columns]^T h over the whole batch; h is the layer below from column `from`
  // on, or without such a layer the input `from`.
  struct WeightTask {
    int64_t norm;
    bool below;
    Range columns;
    int64_t from, fan_in;
    float* to;  // [columns, fan_in], or where tables are folded [columns, weight_columns]
  };

  std::vector<WeightTask> weight_tasks() {
    std::vector<WeightTask> tasks;
    const auto add = [&](int64_t norm, Range columns, bool below, int64_t from, int64_t fan_in, float* weight) {
      const int64_t width = below ? fan_in : spec_.weight_columns;
      // about eight pieces, and where other experts keep the threads busy not so small that h is prepared again
      const int64_t least = below && spec_.n_experts > 2 ? kPiece : 64;
      const int64_t piece = std::clamp<int64_t>((columns.size() / 8 + 15) / 16 * 16, least, kPiece);
      for (const Range& group : pieces_of(columns, operand(norm).group_columns)) {
        for (int64_t c = group.start; c < group.stop; c += piece) {
          tasks.push_back({norm, below, {c, std::min(group.stop, c + piece)}, from, fan_in, weight + c * width});
        }
      }
    };
    for (int64_t l = spec_.depth() - 1; l > 0; --l) {
      for (int64_t e = 0; e < spec_.n_experts; ++e) {
        add(l, {e * spec_.dims[l], (e + 1) * spec_.dims[l]}, true, e * spec_.fan_in(l), spec_.fan_in(l),
            grads_.hidden[l].weight);
      }
    }
    for (int64_t n = 0; spec_.depth() && n < spec_.n_inputs; ++n) {
      const Range experts = spec_.experts_of[n];
      add(0, {experts.start * spec_.dims[0], experts.stop * spec_.dims[0]}, false, n, spec_.in_features,
          grads_.hidden[0].weight);
      if (has_gates()) {
        add(spec_.depth(), spec_.gate_columns_of[n], false, n, spec_.in_features, grads_.gate.weight);
      }
    }
    return tasks;
  }

  // Some rows of the batch at a time, so that both operands stay in the cache with the result; h is computed again.
  void weight_gradient(const WeightTask& t, const PackedInputs<T>& inputs, const Space& space) const {
    const PackedGemm& gemm = best_packed_gemm();
    const int64_t n = t.columns.size(), k = t.fan_in, n_rows = tiles_.rows, ld_h = row_stride<T>(k);
    const Grouped<T>& dz = operand(t.norm);
    const bool parts = small_ && !t.below;
    float* const to = parts ? space.kept.get() : t.to;
    int64_t row = 0;
    do {
      const int64_t rows = std::min(kStretchRows, n_rows - row);
      const T* from = dz.at(row, t.columns.start);
      Ahead ahead;  // the next rows; in fp32 they would drive the operands out of the cache
      const Range next{row + rows, std::min(row + rows + kStretchRows, n_rows)};
      ahead.add(part_of(dz, next, t.columns));
      if (t.below) ahead.add(part_of(saved_.z[t.norm - 1], next, {t.from, t.from + k}));
      T *const operands = space.operands.get(), *const h = space.h.get();
      if (t.below) of_tiles_.hidden(tile(t.norm - 1, {row, row + rows}, {t.from, t.from + k}), h, ld_h);
      if constexpr (!kBf16) {
        const float* source = t.below ? h : x_.at(t.from, row);
        const int64_t ld = t.below ? ld_h : x_.row_stride;
        if (is_small(n, k, n_rows)) {
          kernels_.small_gemm(n, k, rows, from, dz.ld, true, source, ld, false, to, k, row > 0, n < kFewRows);
        } else {
          gemm.wgrad_f32(rows, n, k, from, dz.ld, source, ld, to, k, row > 0);
        }
      } else if (t.below) {
        gemm.wgrad_bf16(rows, n, k, from, dz.ld, h, ld_h, to, k, row > 0, operands, &ahead);
      } else {
        gemm.transpose_bf16(rows, n, from, dz.ld, operands, stretch_stride(n_rows));
        gemm.gemm_bf16(n, k, rows, operands, stretch_stride(n_rows), inputs.at(t.from, row), to, k, row > 0, &ahead);
      }
      row += rows;
    } while (row < n_rows);
    if (parts) small_->tables.put_columns(n, spec_.weight_columns, to, t.to);
  }

  void small_gradient(int64_t index, const Space& space) const {
    if (of_small_->of_gates(index)) return of_small_->make(index, gate_dz_, tiles_.rows, space.sums.get());
    of_small_->make(index, layers_[0].dz, tiles_.rows, space.sums.get());
  }

  const Runtime& runtime_;
  const Kernels& kernels_;
  const TileKernels<T>& of_tiles_;
  const TileKernels<float>& in_f32_;  // for the gates and the inputs
  const ExpertGateLayer& spec_;
  const ExpertGateParams& params_;
  const Inputs x_;
  const Tiles tiles_;
  const bool batch_statistics_;
  const double dropout_;
  const int64_t seed_;
  const ExpertGateSaved<T>& saved_;
  const OutputGrad dout_;
  const ExpertGateGrads& grads_;
  float* const dx_;
  const int64_t dx_columns_;
  const SmallInputs* const small_;
  std::unique_ptr<SmallGrads> of_small_;
  // of each hidden layer, then of the gates
  std::vector<ColumnFactors> factors_;
  std::vector<NormSums> sums_;
  std::vector<LayerGrad<T>> layers_;
  const Scratch<float> gate_memory_;
  const Grouped<float> gate_dz_;
  const Scratch<Bf16> gate_memory_near_;
  const Grouped<Bf16> gate_near_;
  std::unique_ptr<PackedWeights<T>> packed_;
  std::vector<int64_t> starts_, mixers_;
  std::vector<double> out_sums_;
};

}  // namespace fastmtl
