// expert_gate: what its forward and backward share: the description of a layer, its parameters, how its rows are cut.
//
// Layout      x is [N, B, I]; z of hidden layer l has the columns [e * H_l, (e + 1) * H_l) for expert e and lies in
//             groups of them, see Grouped; the gates' z and weights are [B, C].
// Precision   T is what the operands of products, and activations between the passes, are kept in: float, or Bf16. The
//             gates' z, the weights and all that is summed is fp32.
// Threading   through the Runtime: team(limit, tasks, work, f) calls f(worker) on threads that share Phases.
// Accumulation products in fp32, statistics and sums over the batch as in kernels.h.
// Determinism rows are cut into tiles by B alone and weights' gradients by their shape alone; every sum over tiles runs
//             in their order: the result is the same for every number of threads.
// Aliasing    outputs must not overlap inputs; saved tensors are only read by the backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "core/kernels.h"
#include "core/phases.h"
#include "core/pool.h"

namespace fastmtl {

constexpr double kBatchNormMomentum = 0.1;  // fastmtl.spec
constexpr double kBatchNormEpsilon = 1e-5;

struct Range {
  int64_t start, stop;
  int64_t size() const { return stop - start; }
};

// Columns in pieces that stay in the cache, with a tile's height, between the kernels that work on them.
constexpr int64_t kPiece = 256;
inline int64_t n_pieces(int64_t columns) { return (columns + kPiece - 1) / kPiece; }
inline Range piece_of(Range columns, int64_t piece) {
  return {columns.start + piece * kPiece, std::min(columns.stop, columns.start + (piece + 1) * kPiece)};
}
// The pieces of columns that lie in groups; none has columns of two groups.
inline std::vector<Range> pieces_of(Range columns, int64_t group_columns) {
  std::vector<Range> pieces;
  while (columns.size() > 0) {
    const int64_t group = columns.start / group_columns * group_columns;
    const Range rest{columns.start, std::min(columns.stop, group + group_columns)};
    for (int64_t p = 0; p < n_pieces(rest.size()); ++p) pieces.push_back(piece_of(rest, p));
    columns.start = rest.stop;
  }
  return pieces;
}

// A layer of E experts and G gates, see fastmtl.spec.ExpertGateSpec.
struct ExpertGateLayer {
  int64_t in_features, n_inputs, n_experts, activation, gate_columns;
  int64_t weight_columns;  // of the first layer and the gates: in_features, and those of tables folded into them
  int64_t n_folded = 0;    // these tables
  bool output_layer;
  std::vector<int64_t> dims;
  std::vector<Range> experts_of, gate_columns_of;  // of each input
  std::vector<GateView> gates;

  int64_t depth() const { return static_cast<int64_t>(dims.size()); }
  int64_t n_gates() const { return static_cast<int64_t>(gates.size()); }
  // Multiply-adds of the forward for one row; an element's arithmetic between two products counts for sixteen, a number
  // of a folded table's row of sums for two.
  int64_t row_work() const {
    int64_t work = n_inputs * in_features + gate_columns * (in_features + 2 * n_folded);
    for (int64_t l = 0; l < depth(); ++l) work += columns(l) * (fan_in(l) + 16 + (l == 0 ? 2 * n_folded : 0));
    return work;
  }
  int64_t columns(int64_t layer) const { return n_experts * dims[layer]; }
  // Columns of a group, see Grouped: whole experts.
  int64_t group_columns(int64_t layer) const {
    return dims[layer] * std::clamp<int64_t>(kPiece / dims[layer], 1, n_experts);
  }
  int64_t fan_in(int64_t layer) const { return layer == 0 ? in_features : dims[layer - 1]; }
  int64_t weight_size(int64_t layer) const { return columns(layer) * (layer == 0 ? weight_columns : fan_in(layer)); }
};

// Row stride of a matrix of our own: an odd number of cache lines, so that a column of it uses all sets of the cache.
template <class T>
int64_t row_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

// A matrix [B, columns] in groups of columns, one behind the other, each [B, ld]: the rows of a tile of a group are
// neighbours in memory, as the processor's prefetching wants them.
template <class T>
struct Grouped {
  T* data = nullptr;
  int64_t n_rows = 0, group_columns = 1, ld = 0;

  Grouped() = default;
  Grouped(T* to, int64_t rows, int64_t group)
      : data(to), n_rows(rows), group_columns(group), ld(row_stride<T>(group)) {}
  T* at(int64_t row, int64_t column) const {
    const int64_t group = column / group_columns;
    return data + (group * n_rows + row) * ld + column - group * group_columns;
  }
  static int64_t size(int64_t rows, int64_t columns, int64_t group) {
    return (columns + group - 1) / group * rows * row_stride<T>(group);
  }
};

// Linear -> BatchNorm over some columns: [columns, I] and [columns]; the running statistics are written in training.
struct LinearNorm {
  const float *weight, *bias, *gamma, *beta;
  float *running_mean, *running_var;
};
struct LinearNormGrads {
  float *weight, *bias, *gamma, *beta;
};

struct ExpertGateParams {
  std::vector<LinearNorm> hidden;
  std::vector<const float*> alpha;  // [E] a layer; null where nothing is learned
  const float *out_weight = nullptr, *out_bias = nullptr;
  LinearNorm gate{};
};
struct ExpertGateGrads {
  std::vector<LinearNormGrads> hidden;
  std::vector<float*> alpha;
  float *out_weight = nullptr, *out_bias = nullptr;
  LinearNormGrads gate{};
};

// What the forward leaves for the backward.
struct Statistics {
  // [columns] of z without bias. The rests are what rounding to fp32 has taken from them: in a small batch, where
  // almost all of a gradient cancels, they are what remains.
  float *mean, *rstd, *mean_rest, *rstd_rest;
};
template <class T>
struct ExpertGateSaved {
  Bf16* x = nullptr;  // the inputs rounded, [N, B, ld_x], where T is Bf16
  int64_t ld_x = 0;
  std::vector<Grouped<T>> z;
  std::vector<Statistics> hidden;
  Grouped<float> gate_z;
  Statistics gate{};
  float* weights = nullptr;  // [B, C], the gates' softmax
};

struct Inputs {
  const float* data;
  int64_t input_stride, row_stride;
  const float* at(int64_t n, int64_t row) const { return data + n * input_stride + row * row_stride; }
};

// Rows in tiles of equal height, by B alone.
struct Tiles {
  int64_t rows, height, count;
  explicit Tiles(int64_t n_rows) : rows(n_rows) {
    height = std::clamp<int64_t>((n_rows / 8 + kBlock - 1) / kBlock * kBlock, kBlock, 256);
    count = (n_rows + height - 1) / height;
  }
  // Rows of a tile, of which the last may have fewer. What is chosen by them is chosen alike for all tiles: equal rows
  // are to give equal results, since a normalisation of a column that is the same in all rows blows up any difference.
  int64_t most() const { return std::min(rows, height); }
  Range at(int64_t tile) const { return {tile * height, std::min(rows, (tile + 1) * height)}; }
  // The tile that a phase takes as its i-th: every other phase goes backwards, and so begins with what the one before
  // has left in the cache. The forward's phases are counted from 0, the backward's go on behind them.
  int64_t in_turn(int64_t i, int64_t phase) const { return phase % 2 == 0 ? i : count - 1 - i; }
};

// Numbers on a cache line, uninitialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(take(bytes_of(n)), Free{bytes_of(n) >= kPooled}) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  // the system takes a thread's memory back as soon as this much is free
  static constexpr size_t kPooled = size_t{1} << 16;
  struct Free {
    bool pooled;
    void operator()(T* data) const {
      if (pooled) return Pool::global().give(data);
      ::operator delete[](data, kLine);
    }
  };
  static size_t bytes_of(int64_t n) { return sizeof(T) * static_cast<size_t>(n); }
  static T* take(size_t bytes) {
    return static_cast<T*>(bytes >= kPooled ? Pool::global().take(bytes) : ::operator new[](bytes, kLine));
  }
  std::unique_ptr<T, Free> data_;
};

// The constants that turn z into y, for all columns of one BatchNorm; `fill` takes them from the statistics.
struct ColumnFactors {
  std::vector<float> scale, shift, alpha;
  const float *mean, *rstd, *mean_rest, *rstd_rest, *gamma, *beta;
  ColumnFactors(const Statistics& of, const LinearNorm& params, int64_t columns)
      : scale(static_cast<size_t>(columns)),
        shift(static_cast<size_t>(columns)),
        mean(of.mean),
        rstd(of.rstd),
        mean_rest(of.mean_rest),
        rstd_rest(of.rstd_rest),
        gamma(params.gamma),
        beta(params.beta) {}
  Range all() const { return {0, static_cast<int64_t>(scale.size())}; }
  void fill(Range columns) {
    for (int64_t c = columns.start; c < columns.stop; ++c) {
      scale[c] = gamma[c] * rstd[c];
      shift[c] = beta[c] - mean_rest[c] * scale[c];
    }
  }
};

template <class T>
ColumnFactors hidden_factors(const ExpertGateLayer& spec, const ExpertGateParams& params,
                             const ExpertGateSaved<T>& saved, int64_t layer) {
  ColumnFactors factors(saved.hidden[layer], params.hidden[layer], spec.columns(layer));
  if (params.alpha[layer]) {
    factors.alpha.resize(static_cast<size_t>(spec.columns(layer)));
    for (int64_t c = 0; c < spec.columns(layer); ++c) factors.alpha[c] = params.alpha[layer][c / spec.dims[layer]];
  }
  return factors;
}

// Some rows and columns of a matrix, which lie in one group, for Ahead.
template <class T>
Ahead::Part part_of(const Grouped<T>& matrix, Range rows, Range columns) {
  constexpr int64_t kSize = sizeof(T);
  return {matrix.at(rows.start, columns.start), rows.size(), columns.size() * kSize, matrix.ld * kSize};
}

// Key of a layer's dropout: layers and seeds must not share their masks.
inline Dropout dropout_of(double p, int64_t seed, int64_t layer) {
  Dropout dropout;
  dropout.on = p > 0;
  dropout.key = (static_cast<uint64_t>(seed) ^ (0xD1B54A32D192ED03ull * static_cast<uint64_t>(layer + 1))) *
                0x9E3779B97F4A7C15ull;
  dropout.threshold = static_cast<uint32_t>(std::min(p * 4294967296.0, 4294967295.0));
  dropout.scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f;
  return dropout;
}

// The tile of rows x columns of one BatchNorm, which lie in one group; `width` is the share of one expert.
template <class T>
Tile<T> tile_of(const Grouped<T>& z, const ColumnFactors& factors, Range rows, Range columns, int64_t width,
                int64_t activation, const Dropout& dropout, bool exact) {
  const int64_t c = columns.start;
  Tile<T> tile;
  tile.activation = activation;
  tile.exact = exact;
  tile.rows = rows.size();
  tile.cols = columns.size();
  tile.width = width;
  tile.z = z.at(rows.start, c);
  tile.ld = z.ld;
  tile.mean = factors.mean + c;
  tile.scale = factors.scale.data() + c;
  tile.shift = factors.shift.data() + c;
  tile.alpha = factors.alpha.empty() ? nullptr : factors.alpha.data() + c;
  tile.dropout = dropout;
  tile.first_row = rows.start;
  tile.first_column = c;
  return tile;
}

}  // namespace fastmtl
