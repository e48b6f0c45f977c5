// A whole model for prediction: batch normalisation folded into the linear layers, weights packed once, and for each
// tile of rows one pass from the looked-up row to the predictions, in scratch memory that stays in the cache.
//
// Layout      of a model: inference_program.h. A tile's matrices are float, or Bf16 in a model packed so; sums are fp32
//             in both.
// Threading   a packed model is constant: any number of threads may run tiles of it at once, each with its own scratch.
// Determinism a row's predictions depend on that row and the model alone: not on the batch it is in, nor on the cut
//             into tiles, nor on the number of threads.
// Aliasing    none. The parameters are only read while the model is packed.
#pragma once

#include <atomic>
#include <cmath>
#include <type_traits>

#include "core/inference_kernels.h"
#include "core/inference_program.h"

namespace fastmtl {

template <class T>
class PackedInference final : public Inference {
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

 public:
  explicit PackedInference(const Program& program)
      : gemm_(best_packed_gemm()),
        kernels_(best_kernels()),
        between_(best_inference_kernels()),
        small_(program.small, program.width),
        width_(small_.kept_columns()),
        n_logits_(program.n_logits),
        outputs_(program.outputs) {
    views_.push_back({reserve<T>(width_), stride<T>(width_), 0, width_});
    if constexpr (kBf16) block_floats(stride<float>(width_));
    picks_ = reserve<int32_t>(small_.count());
    logits_ = reserve<float>(2 * n_logits_);
    for (const Stage& stage : program.stages) {
      if (stage.is_bank) {
        add(stage.bank);
      } else {
        add(stage.transfer);
      }
    }
  }

  int64_t width() const override { return width_; }
  const SmallTables& small() const override { return small_; }
  int64_t n_outputs() const override { return static_cast<int64_t>(outputs_.size()); }
  int64_t work() const override { return work_; }
  bool is_bf16() const override { return kBf16 && gemm_.has_bf16; }

  int64_t tile_rows() const override {
    constexpr int64_t kCache = 1 << 20;
    return std::clamp<int64_t>(kCache / std::max<int64_t>(1, row_bytes_) / kBlock * kBlock, kBlock, 256);
  }

  size_t scratch_bytes(int64_t rows) const override {
    const int64_t block = kBlock * (2 * stride<float>(z_columns_) * 4 + 2 * stride<T>(h_columns_) * int64_t{sizeof(T)});
    return static_cast<size_t>(rows * row_bytes_ + block);
  }

  void run(const RowSource& source, int64_t rows, float* out, std::byte* scratch) const override {
    const Space space = lay_out(rows, scratch);
    T* x = space.template at<T>(views_[0].buffer);
    const int64_t ld_x = views_[0].ld;
    if constexpr (kBf16) {
      const int64_t ld = stride<float>(width_);
      for (int64_t start = 0; start < rows; start += kBlock) {
        const int64_t stop = std::min(rows, start + kBlock);
        source.fill(start, stop, space.z, ld);
        gemm_.round_bf16(stop - start, width_, space.z, ld, x + start * ld_x, ld_x);
      }
    } else {
      source.fill(0, rows, x, ld_x);
    }
    if (small_.count() > 0) source.pick(0, rows, space.template at<int32_t>(picks_), stride<int32_t>(small_.count()));
    // a few rows are done when the weights are read: those that the last call left in the cache come first
    const bool backwards = rows <= kFew && (turn_.fetch_add(1, std::memory_order_relaxed) & 1);
    for (const Packed& stage : stages_) {
      if (stage.is_bank) {
        run_bank(banks_[stage.index], rows, space, backwards);
      } else {
        run_transfer(transfers_[stage.index], rows, space);
      }
    }
    finish(rows, space, out);
  }

 private:
  static constexpr int64_t kBlock = 32;  // rows that go through all layers of an expert at once
  static constexpr int64_t kFew = 8;
  static constexpr int64_t kWide = 256;  // columns that the first layers of some experts fill together

  // A matrix of the tile: columns [column, column + cols) of a buffer.
  struct View {
    int64_t buffer;  // bytes of all buffers before it, a row
    int64_t ld, column, cols;
  };
  // Scratch memory of a tile: buffer after buffer, then what one block of rows needs.
  struct Space {
    int64_t rows;
    std::byte* base;
    float *z, *last;  // [kBlock, stride(z_columns_)]
    T *h, *next;      // [kBlock, stride(h_columns_)]
    template <class U>
    U* at(int64_t buffer) const {
      return reinterpret_cast<U*>(base + rows * buffer);
    }
  };
  struct Linear {
    int64_t n, k, weight, bias;  // where the packed weight and the bias begin
    int64_t sums;                // and what it makes of small tables; -1: it reads none
  };
  // Experts that read one input, whose first layers are one product.
  struct Group {
    int64_t input, first, count;
    std::vector<std::vector<Linear>> layers;  // [depth][1 for the first layer, else count]
  };
  struct GateProduct {
    int64_t input, column;
    Linear linear;
  };
  struct Bank {
    ExpertGateLayer layer;
    std::vector<int64_t> gate_experts;  // what the gates point to
    std::vector<View> inputs;
    std::vector<Group> groups;
    std::vector<GateProduct> gates;
    std::vector<int64_t> alpha;   // a layer; -1 where nothing is learned
    std::vector<int64_t> biases;  // of all experts' columns, a layer
    int64_t gate_bias, gate_ones, gate_z, gate_weights;
    int64_t mixed, ld_mixed;  // the experts' last hidden layer, side by side
    std::vector<View> results;
    std::vector<int64_t> logits;
    int64_t out_weight, out_bias;
    std::vector<Linear> direct;  // an output layer on the input itself, for each input
  };
  struct Transfer {
    View own, info, result;
    int64_t width;
    Linear linear;
    int64_t own_z, info_z;
  };
  struct Packed {
    bool is_bank;
    size_t index;
  };

  // ------------------------------------------------------------------------------------------------ packing

  template <class U>
  int64_t reserve(int64_t cols) {
    const int64_t buffer = row_bytes_;
    row_bytes_ += stride<U>(cols) * static_cast<int64_t>(sizeof(U));
    return buffer;
  }
  void block_floats(int64_t cols) { z_columns_ = std::max(z_columns_, cols); }
  void block_hidden(int64_t cols) { h_columns_ = std::max(h_columns_, cols); }

  int64_t keep(const float* from, int64_t n) {
    const int64_t at = static_cast<int64_t>(floats_.size());
    floats_.insert(floats_.end(), from, from + n);
    return at;
  }
  int64_t keep(int64_t n, float value) {
    floats_.insert(floats_.end(), static_cast<size_t>(n), value);
    return static_cast<int64_t>(floats_.size()) - n;
  }

  // Rows [first, first + n) of a weight [*, k], with the normalisation that follows folded in where there is one; the
  // bias goes to `bias`, which is kept already. `input`: what it reads, where that may be matrix 0.
  Linear pack(const float* weight, const LinearNorm* norm, int64_t first, int64_t n, int64_t k, int64_t bias,
              const View* input = nullptr) {
    std::vector<float> folded(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = first + i;
      double scale = 1;
      if (norm) {
        scale = static_cast<double>(norm->gamma[c]) /
                std::sqrt(static_cast<double>(norm->running_var[c]) + kBatchNormEpsilon);
        floats_[static_cast<size_t>(bias + i)] = static_cast<float>(
            (static_cast<double>(norm->bias[c]) - static_cast<double>(norm->running_mean[c])) * scale +
            static_cast<double>(norm->beta[c]));
      }
      for (int64_t p = 0; p < k; ++p)
        folded[static_cast<size_t>(i * k + p)] = static_cast<float>(static_cast<double>(weight[c * k + p]) * scale);
    }
    int64_t sums = -1;
    if (small_.count() > 0 && input != nullptr && input->buffer == views_[0].buffer) {
      sums = small_.append_sums(n, k, folded.data(), sums_);
      small_.keep_columns(n, k, folded.data(), folded.data());
      k = small_.kept_columns();
    }
    work_ += n * k;
    Linear linear{n, k, static_cast<int64_t>(weights_.size()), bias, sums};
    if constexpr (kBf16) {
      weights_.resize(weights_.size() + static_cast<size_t>(packed_bf16_size(n, k)));
      gemm_.pack_bf16(n, k, folded.data(), k, false, weights_.data() + linear.weight);
    } else {
      weights_.resize(weights_.size() + static_cast<size_t>(packed_f32_size(n, k)));
      gemm_.pack_f32(n, k, folded.data(), k, false, weights_.data() + linear.weight);
    }
    return linear;
  }

  void add(const BankStage& stage) {
    Bank bank;
    bank.layer = stage.layer;
    const ExpertGateLayer& layer = stage.layer;
    const ExpertGateParams& params = stage.params;
    const int64_t depth = layer.depth(), n_experts = layer.n_experts;
    for (int64_t input : stage.inputs) bank.inputs.push_back(views_[static_cast<size_t>(input)]);
    bank.logits = stage.logits;
    for (int64_t l = 0; l < depth; ++l) {
      bank.biases.push_back(keep(layer.columns(l), 0.0f));
      bank.alpha.push_back(params.alpha[l] ? keep(layer.columns(l), 0.0f) : -1);
      for (int64_t c = 0; params.alpha[l] && c < layer.columns(l); ++c) {
        floats_[static_cast<size_t>(bank.alpha[l] + c)] = params.alpha[l][c / layer.dims[l]];
      }
    }
    if (layer.output_layer) {
      const int64_t width = depth ? layer.dims[depth - 1] : layer.in_features;
      bank.out_weight = keep(params.out_weight, n_experts * width);
      bank.out_bias = keep(params.out_bias, n_experts);
      work_ += n_experts * width;
    }
    for (int64_t n = 0; n < layer.n_inputs; ++n) {
      const Range experts = layer.experts_of[n], columns = layer.gate_columns_of[n];
      if (depth == 0) {
        bank.direct.push_back(pack(params.out_weight, nullptr, experts.start, experts.size(), layer.in_features, -1));
        block_floats(experts.size());
        continue;
      }
      const int64_t most = std::max<int64_t>(1, kWide / layer.dims[0]);
      for (int64_t first = experts.start; first < experts.stop; first += most) {
        const int64_t count = std::min(most, experts.stop - first);
        Group group{n, first, count, {}};
        for (int64_t l = 0; l < depth; ++l) {
          const int64_t width = layer.dims[l];
          block_floats(count * width);
          block_hidden(count * width);
          std::vector<Linear> linears;
          const int64_t pieces = l == 0 ? 1 : count, wide = l == 0 ? count * width : width;
          for (int64_t i = 0; i < pieces; ++i) {
            const int64_t c = first * width + i * wide;
            linears.push_back(pack(params.hidden[l].weight, &params.hidden[l], c, wide, layer.fan_in(l),
                                   bank.biases[l] + c, l == 0 ? &bank.inputs[static_cast<size_t>(n)] : nullptr));
          }
          group.layers.push_back(std::move(linears));
        }
        bank.groups.push_back(std::move(group));
      }
      if (columns.size() > 0) bank.gates.push_back({n, columns.start, {}});
    }
    if (!layer.gates.empty()) {
      bank.gate_bias = keep(layer.gate_columns, 0.0f);
      bank.gate_ones = keep(layer.gate_columns, 1.0f);
      keep(layer.gate_columns, 0.0f);
      for (GateProduct& gate : bank.gates) {
        const Range columns = layer.gate_columns_of[gate.input];
        gate.linear = pack(params.gate.weight, &params.gate, columns.start, columns.size(), layer.in_features,
                           bank.gate_bias + columns.start, &bank.inputs[static_cast<size_t>(gate.input)]);
      }
      // the kernel subtracts what it is given
      for (int64_t c = 0; c < layer.gate_columns; ++c) floats_[static_cast<size_t>(bank.gate_bias + c)] *= -1;
      bank.gate_z = reserve<float>(layer.gate_columns);
      bank.gate_weights = reserve<float>(layer.gate_columns);
      for (const GateView& gate : layer.gates) {
        bank.gate_experts.insert(bank.gate_experts.end(), gate.experts, gate.experts + gate.fan_in);
      }
    }
    if (!layer.output_layer) {
      const int64_t width = layer.dims[depth - 1];
      bank.mixed = reserve<T>(n_experts * width);
      bank.ld_mixed = stride<T>(n_experts * width);
      const bool mixes = !layer.gates.empty();
      const int64_t results = mixes ? static_cast<int64_t>(layer.gates.size()) : n_experts;
      const int64_t buffer = mixes ? reserve<T>(results * width) : bank.mixed;
      for (int64_t i = 0; i < results; ++i) {
        bank.results.push_back({buffer, stride<T>(results * width), i * width, width});
        views_.push_back(bank.results.back());
      }
    }
    stages_.push_back({true, banks_.size()});
    banks_.push_back(std::move(bank));
    // the copy's gates point to the plan, which need not outlive the packing
    Bank& kept = banks_.back();
    int64_t at = 0;
    for (GateView& gate : kept.layer.gates) {
      gate.experts = kept.gate_experts.data() + at;
      at += gate.fan_in;
    }
  }

  void add(const TransferStage& stage) {
    Transfer transfer;
    transfer.width = stage.width;
    transfer.own = views_[static_cast<size_t>(stage.own)];
    transfer.info = views_[static_cast<size_t>(stage.info)];
    transfer.linear = pack(stage.qkv, nullptr, 0, 3 * stage.width, stage.width, -1);
    work_ += 3 * stage.width * stage.width;
    block_floats(3 * stage.width);
    transfer.result = {reserve<T>(stage.width), stride<T>(stage.width), 0, stage.width};
    views_.push_back(transfer.result);
    stages_.push_back({false, transfers_.size()});
    transfers_.push_back(transfer);
  }

  // ------------------------------------------------------------------------------------------------ running

  Space lay_out(int64_t rows, std::byte* scratch) const {
    Space space{rows, scratch, nullptr, nullptr, nullptr, nullptr};
    space.z = reinterpret_cast<float*>(scratch + rows * row_bytes_);
    space.last = space.z + kBlock * stride<float>(z_columns_);
    space.h = reinterpret_cast<T*>(space.last + kBlock * stride<float>(z_columns_));
    space.next = space.h + kBlock * stride<T>(h_columns_);
    return space;
  }

  T* row_of(const View& view, const Space& space, int64_t row) const {
    return space.template at<T>(view.buffer) + row * view.ld + view.column;
  }
  const float* kept(int64_t at) const { return floats_.data() + at; }
  const int32_t* picks_of(const Space& space, int64_t row) const {
    return space.template at<int32_t>(picks_) + row * stride<int32_t>(small_.count());
  }

  // `picks`: of the rows, where the layer may read small tables.
  void multiply(int64_t rows, const T* a, int64_t ld_a, const Linear& linear, float* c, int64_t ld_c,
                const int32_t* picks = nullptr) const {
    const T* weight = weights_.data() + linear.weight;
    if (linear.sums >= 0) {
      best_kernels().add_up(rows, linear.n, picks, stride<int32_t>(small_.count()), small_.count(),
                            sums_.data() + linear.sums, SmallTables::stride(linear.n), c, ld_c);
    }
    if constexpr (kBf16) {
      gemm_.gemm_bf16(rows, linear.n, linear.k, a, ld_a, weight, c, ld_c, linear.sums >= 0, nullptr);
    } else {
      gemm_.gemm_f32(rows, linear.n, linear.k, a, ld_a, weight, c, ld_c, linear.sums >= 0, nullptr);
    }
  }

  void activate(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, T* h, int64_t ld_h) const {
    if constexpr (kBf16) {
      between_.activate_bf16(bend, rows, z, ld_z, h, ld_h);
    } else {
      between_.activate(bend, rows, z, ld_z, h, ld_h);
    }
  }

  void run_bank(const Bank& bank, int64_t rows, const Space& space, bool backwards) const {
    if (!bank.direct.empty()) return run_direct(bank, rows, space);
    const size_t n = bank.groups.size();
    for (size_t i = 0; i < n; ++i) {
      const Group& group = bank.groups[backwards ? n - 1 - i : i];
      for (int64_t start = 0; start < rows; start += kBlock) {
        run_experts(bank, group, start, std::min(kBlock, rows - start), space);
      }
    }
    if (!bank.gates.empty()) mix(bank, rows, space);
  }

  // All layers of a group of experts for a block of rows.
  void run_experts(const Bank& bank, const Group& group, int64_t start, int64_t rows, const Space& space) const {
    const ExpertGateLayer& layer = bank.layer;
    const int64_t depth = layer.depth(), ld_z = stride<float>(z_columns_), ld_h = stride<T>(h_columns_);
    const View& input = bank.inputs[static_cast<size_t>(group.input)];
    multiply(rows, row_of(input, space, start), input.ld, group.layers[0][0], space.z, ld_z, picks_of(space, start));
    T *h = space.h, *next = space.next;
    for (int64_t l = 0; l < depth; ++l) {
      const int64_t width = layer.dims[l], first = group.first * width, columns = group.count * width;
      const Bend bend{layer.activation, columns, width, kept(bank.biases[l] + first),
                      bank.alpha[l] < 0 ? nullptr : kept(bank.alpha[l] + first)};
      if (l + 1 == depth) {
        if (layer.output_layer) {
          between_.activate(bend, rows, space.z, ld_z, space.last, ld_z);
        } else {
          activate(bend, rows, space.z, ld_z, space.template at<T>(bank.mixed) + start * bank.ld_mixed + first,
                   bank.ld_mixed);
        }
        break;
      }
      activate(bend, rows, space.z, ld_z, h, ld_h);
      for (int64_t e = 0; e < group.count; ++e) {
        multiply(rows, h + e * width, ld_h, group.layers[static_cast<size_t>(l + 1)][static_cast<size_t>(e)],
                 space.z + e * layer.dims[l + 1], ld_z);
      }
      std::swap(h, next);
    }
    if (!layer.output_layer) return;
    const int64_t width = layer.dims[depth - 1];
    float* logits = space.template at<float>(logits_) + start * n_logits_;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t e = group.first + i;
      best_tile_kernels<float>().logits(rows, width, 1, space.last + i * width, ld_z, kept(bank.out_weight + e * width),
                                        kept(bank.out_bias + e), logits + bank.logits[static_cast<size_t>(e)],
                                        n_logits_);
    }
  }

  void mix(const Bank& bank, int64_t rows, const Space& space) const {
    const ExpertGateLayer& layer = bank.layer;
    const int64_t ld = stride<float>(layer.gate_columns), width = layer.dims[layer.depth() - 1];
    float *z = space.template at<float>(bank.gate_z), *weights = space.template at<float>(bank.gate_weights);
    for (const GateProduct& gate : bank.gates) {
      const View& input = bank.inputs[static_cast<size_t>(gate.input)];
      multiply(rows, row_of(input, space, 0), input.ld, gate.linear, z + gate.column, ld, picks_of(space, 0));
    }
    Tile<float> tile{};
    tile.activation = kLinear;
    tile.rows = rows;
    tile.cols = layer.gate_columns;
    tile.width = 1;
    tile.z = z;
    tile.ld = ld;
    tile.mean = kept(bank.gate_bias);
    tile.scale = kept(bank.gate_ones);
    tile.shift = tile.scale + layer.gate_columns;
    kernels_.gate_softmax(tile, layer.gates.data(), static_cast<int64_t>(layer.gates.size()), weights, ld);
    std::vector<T*> to;
    for (const View& view : bank.results) to.push_back(row_of(view, space, 0));
    const T* h = space.template at<T>(bank.mixed);
    const int64_t ld_to = bank.results[0].ld;
    if constexpr (kBf16) {
      between_.mix_bf16(layer.gates.data(), static_cast<int64_t>(layer.gates.size()), rows, width, weights, ld, h,
                        bank.ld_mixed, to.data(), ld_to);
    } else {
      between_.mix(layer.gates.data(), static_cast<int64_t>(layer.gates.size()), rows, width, weights, ld, h,
                   bank.ld_mixed, to.data(), ld_to);
    }
  }

  void run_direct(const Bank& bank, int64_t rows, const Space& space) const {
    const int64_t ld_z = stride<float>(z_columns_);
    for (size_t n = 0; n < bank.direct.size(); ++n) {
      const View& input = bank.inputs[n];
      const Range experts = bank.layer.experts_of[n];
      for (int64_t start = 0; start < rows; start += kBlock) {
        const int64_t block = std::min(kBlock, rows - start);
        multiply(block, row_of(input, space, start), input.ld, bank.direct[n], space.z, ld_z);
        float* logits = space.template at<float>(logits_) + start * n_logits_;
        for (int64_t e = experts.start; e < experts.stop; ++e) {
          for (int64_t r = 0; r < block; ++r) {
            logits[r * n_logits_ + bank.logits[static_cast<size_t>(e)]] =
                space.z[r * ld_z + e - experts.start] + kept(bank.out_bias)[e];
          }
        }
      }
    }
  }

  void run_transfer(const Transfer& transfer, int64_t rows, const Space& space) const {
    const int64_t ld_z = stride<float>(z_columns_), ld = transfer.result.ld;
    for (int64_t start = 0; start < rows; start += kBlock) {
      const int64_t block = std::min(kBlock, rows - start);
      multiply(block, row_of(transfer.own, space, start), transfer.own.ld, transfer.linear, space.z, ld_z);
      multiply(block, row_of(transfer.info, space, start), transfer.info.ld, transfer.linear, space.last, ld_z);
      T* to = row_of(transfer.result, space, start);
      if constexpr (kBf16) {
        between_.transfer_bf16(block, transfer.width, space.z, space.last, ld_z, to, ld);
      } else {
        between_.transfer(block, transfer.width, space.z, space.last, ld_z, to, ld);
      }
    }
  }

  void finish(int64_t rows, const Space& space, float* out) const {
    const float* logits = space.template at<float>(logits_);
    float* probabilities = space.template at<float>(logits_) + rows * n_logits_;
    between_.sigmoid(rows * n_logits_, logits, probabilities);
    const int64_t n_out = n_outputs();
    for (int64_t t = 0; t < n_out; ++t) {
      const Output& output = outputs_[static_cast<size_t>(t)];
      const float* from = output.kind == kLogit ? logits : probabilities;
      for (int64_t r = 0; r < rows; ++r) {
        const float a = from[r * n_logits_ + output.a];
        out[r * n_out + t] = output.kind == kProduct ? a * from[r * n_logits_ + output.b] : a;
      }
    }
  }

  const PackedGemm& gemm_;
  const Kernels& kernels_;
  const InferenceKernels& between_;
  const SmallTables small_;
  const int64_t width_, n_logits_;
  const std::vector<Output> outputs_;
  int64_t logits_ = 0, picks_ = 0, row_bytes_ = 0, z_columns_ = 1, h_columns_ = 1, work_ = 0;
  std::vector<T, OnLines<T>> weights_;
  std::vector<float, OnLines<float>> sums_;
  std::vector<float> floats_;
  std::vector<View> views_;
  std::vector<Packed> stages_;
  std::vector<Bank> banks_;
  std::vector<Transfer> transfers_;
  mutable std::atomic<uint32_t> turn_{0};
};

}  // namespace fastmtl
