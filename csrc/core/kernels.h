// The elementwise and row-wise kernels of expert_gate, and the table by which the best build of them is chosen.
//
// Layout      every matrix is row-major with a row stride ("ld"); a kernel works on `rows` rows and on the columns
//             [0, cols) behind the pointers it is given, so that the caller can hand it a tile.
// Threading   none: the caller gives each thread its own tiles.
// Accumulation over rows in double, in their order; statistics that are not `exact`, and what is summed of activations
//             in bf16, in fp32 for sixteen rows at a time and these sums in double. Over the columns of a row in fp32,
//             sixteen at a time.
// Determinism a tile's result depends on the tile alone.
// Aliasing    only where a kernel says "in place".
#pragma once

#include <cstdint>

#include "core/packed_gemm.h"

namespace fastmtl {

// In the order of fastmtl.spec.ACTIVATIONS.
enum Activation : int64_t {
  kRelu = 0,
  kSigmoid,
  kLeakyRelu,
  kPRelu,
  kDice,
  kSoftmax,
  kTanh,
  kGelu,
  kSilu,
  kLinear,
  kActivations
};

constexpr int64_t kBlock = 32;              // rows whose activations stay in the cache between two kernels
constexpr int64_t kSmallProduct = 1 << 18;  // multiply-adds for which a library's product costs more than it gains
constexpr int64_t kFewRows = 64;            // a batch in which sums cancel so far that fp32 is not enough for them
constexpr float kDiceEpsilon = 1e-3f;       // fastmtl.spec.DICE_EPSILON

// Dropout by a counter-based generator: whether element (row, column) of a layer is kept depends on the layer's key,
// the row and the column only, so it can be asked again in the backward, by any thread.
struct Dropout {
  uint64_t key = 0;
  uint32_t threshold = 0;  // dropped below
  float scale = 1;         // 1 / (1 - p)
  bool on = false;
};

// A tile of one layer: z is the linear layer's result without bias; y = (z - mean) * scale + shift is normalised, with
// scale = gamma * rstd; alpha is the activation's learned scalar, spread over the columns. T, float or Bf16, is what
// activations and their gradients are kept in: they are computed in fp32 and rounded where they are stored.
template <class T>
struct Tile {
  int64_t activation;
  int64_t rows, cols;
  int64_t width;  // H: columns of one expert; cols is a multiple of it
  const T* z;     // [rows, ld]
  int64_t ld;
  const float *mean, *scale, *shift, *alpha;  // [cols]; alpha may be null
  Dropout dropout;
  int64_t first_row, first_column;  // where the tile lies in the layer, for the dropout
  bool exact;                       // whether the batch has few rows, see kFewRows
};

// Sums over the rows of a tile, added to [cols] doubles: dy, dy * (z - mean), and each column's share in dalpha.
struct GradSums {
  double *dy, *dy_centred, *dalpha;  // dalpha may be null
};

// One gate: softmax over `fan_in` columns that mixes as many experts.
struct GateView {
  int64_t column;  // first of its columns
  int64_t fan_in;
  const int64_t* experts;  // [fan_in]
};

// The kernels over activations that are kept as T.
template <class T>
struct TileKernels {
  // Mean and sum of squared deviations of each column of z, of at least one row; keeps z as T too, where `kept` is not
  // null.
  void (*column_stats)(const float* z, int64_t ld, int64_t rows, int64_t cols, bool exact, double* mean, double* m2,
                       T* kept, int64_t ld_kept);

  // h = dropout(activation(y)).
  void (*hidden)(const Tile<T>& tile, T* h, int64_t ld_h);
  void (*hidden_f32)(const Tile<T>& tile, float* h, int64_t ld_h);

  // dh -> dy, the gradient of y; adds the sums. dy may be dh.
  void (*hidden_grad)(const Tile<T>& tile, const float* dh, int64_t ld_dh, T* dy, int64_t ld_dy, const GradSums& sums);

  // dy -> dz = scale * (dy - mean_dy - (z - mean) * slope); both null: dz = scale * dy. In double where the tile is
  // exact, because in a small batch almost nothing is left of the difference. dz may be dy.
  void (*linear_grad)(const Tile<T>& tile, const T* dy, int64_t ld_dy, const double* mean_dy, const double* slope,
                      T* dz, int64_t ld_dz);

  // out[g] = sum over k of weights[column_g + k] * h[experts_g[k]].
  void (*mix)(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, const float* weights, int64_t ld_w,
              const T* h, int64_t ld_h, float* const* out, int64_t ld_out);

  // From dout[g]: dh[e] for each expert, and ds, the gradient of the gates' normalised z. `mixers` lists for expert e
  // the (gate, column) pairs that mix it at [2 * starts[e], 2 * starts[e + 1]).
  void (*mix_grad)(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, int64_t n_experts,
                   const int64_t* starts, const int64_t* mixers, const float* weights, int64_t ld_w, const T* h,
                   int64_t ld_h, const float* const* dout, int64_t ld_dout, float* dh, int64_t ld_dh, float* ds,
                   int64_t ld_ds);

  // Adds each row of dz to the rows picks[i] of `sums`, which are fp32: the way back of Kernels::add_up.
  void (*sum_by_pick)(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks, const T* dz,
                      int64_t ld_dz, float* sums, int64_t ld_sums);

  // logits[r, e] = <h[r, e], weight[e]> + bias[e].
  void (*logits)(int64_t rows, int64_t width, int64_t n_experts, const T* h, int64_t ld_h, const float* weight,
                 const float* bias, float* out, int64_t ld_out);

  // dh[r, e] = dout[r, e] * weight[e]; adds to dweight [E * H] and dbias [E].
  void (*logits_grad)(int64_t rows, int64_t width, int64_t n_experts, const T* h, int64_t ld_h, const float* weight,
                      const float* dout, int64_t ld_dout, float* dh, int64_t ld_dh, double* dweight, double* dbias);
};

// A table [rows, dim] whose looked-up row fills the columns [column, column + dim) of what a layer reads.
struct SmallTable {
  int64_t column, dim, rows;
  const float* values;
};

struct Kernels {
  const char* name;

  // c [m, n] = a [m, k] b [k, n], plus c where it accumulates; a transposed operand is given as its [k, m] or [n, k].
  // For products of at most kSmallProduct multiply-adds, where calling a library costs more than it gains. few_rows:
  // summed in more parts, for a result of so few rows in all (kFewRows) that what reads it blows rounding up.
  void (*small_gemm)(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, bool transpose_a, const float* b,
                     int64_t ld_b, bool transpose_b, float* c, int64_t ld_c, bool accumulate, bool few_rows);

  // sums [the tables' rows one below the other, ld_sums]: each row times the columns of `weight` [cols, width] that
  // read it. ld_sums is a multiple of kPanel; columns up to the next multiple of it are written too.
  void (*fold)(const SmallTable* tables, int64_t n_tables, int64_t cols, const float* weight, int64_t width,
               float* sums, int64_t ld_sums);

  // From the gradient of `sums`, whose columns behind the last are zero: dweight [cols, width], the columns that read
  // tables, and of the tables' rows one behind the other dvalues, which may be null.
  void (*fold_grad)(const SmallTable* tables, int64_t n_tables, int64_t cols, const float* weight, int64_t width,
                    const float* sums, int64_t ld_sums, float* dweight, float* dvalues);

  // z = the sum over i of the rows picks[i] of `sums`: what small tables give to a linear layer (small_tables.h).
  void (*add_up)(int64_t rows, int64_t cols, const int32_t* picks, int64_t ld_picks, int64_t n_picks, const float* sums,
                 int64_t ld_sums, float* z, int64_t ld_z);

  // Mixing weights [rows, ld_w] from the gates' z: normalised, then softmax gate by gate.
  void (*gate_softmax)(const Tile<float>& tile, const GateView* gates, int64_t n_gates, float* weights, int64_t ld_w);

  // losses [n_tasks]: the mean over the rows that have a label (NaN: none) of the cross-entropy or squared error of
  // logits [rows, n_tasks]; grad [rows, n_tasks]: of the sum of factors * losses by the logits. All dense.
  void (*task_losses)(int64_t rows, int64_t n_tasks, const float* logits, const float* labels,
                      const bool* is_classification, const float* factors, float* losses, float* grad);
};

// The kernels as built for one instruction set.
namespace baseline {
const Kernels& kernels();
const TileKernels<float>& tile_kernels_f32();
const TileKernels<Bf16>& tile_kernels_bf16();
}  // namespace baseline
namespace avx2 {
const Kernels& kernels();
const TileKernels<float>& tile_kernels_f32();
const TileKernels<Bf16>& tile_kernels_bf16();
}  // namespace avx2
namespace avx512 {
const Kernels& kernels();
const TileKernels<float>& tile_kernels_f32();
const TileKernels<Bf16>& tile_kernels_bf16();
}  // namespace avx512

namespace avx512_bf16 {
const TileKernels<Bf16>& tile_kernels_bf16();
}

// The best build that this processor runs; FASTMTL_ISA=baseline, avx2 or avx512 asks for one by name.
const Kernels& best_kernels();
template <class T>
const TileKernels<T>& best_tile_kernels();
template <>
const TileKernels<float>& best_tile_kernels();
template <>
const TileKernels<Bf16>& best_tile_kernels();

}  // namespace fastmtl
