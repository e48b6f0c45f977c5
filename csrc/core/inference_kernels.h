// What inference does between two matrix products, and the table by which the best build of it is chosen.
//
// Layout      matrices are row-major with a row stride; operands of products are float, or Bf16 where a model is packed
//             so.
// Threading   none; the caller gives each thread its own tiles.
// Accumulation fp32, over the columns of a row sixteen at a time, over experts in a gate's order.
// Determinism a row's result depends on that row alone, not on the rows beside it.
// Aliasing    none.
#pragma once

#include "core/kernels.h"
#include "core/packed_gemm.h"

namespace fastmtl {

// What follows a folded linear layer.
struct Bend {
  int64_t activation;
  int64_t cols, width;  // cols is a multiple of width, the columns of one expert
  const float* bias;    // [cols]
  const float* alpha;   // [cols]; null where nothing is learned
};

struct InferenceKernels {
  // h = activation(z + bias).
  void (*activate)(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, float* h, int64_t ld_h);
  void (*activate_bf16)(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, Bf16* h, int64_t ld_h);

  // out[g] = sum over k of weights[column_g + k] * h[experts_g[k]].
  void (*mix)(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, const float* weights, int64_t ld_w,
              const float* h, int64_t ld_h, float* const* out, int64_t ld_out);
  void (*mix_bf16)(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, const float* weights,
                   int64_t ld_w, const Bf16* h, int64_t ld_h, Bf16* const* out, int64_t ld_out);

  // AITM's attention over two vectors of `width`, whose queries, keys and values lie side by side: [rows, 3 width].
  void (*transfer)(int64_t rows, int64_t width, const float* own, const float* info, int64_t ld, float* out,
                   int64_t ld_out);
  void (*transfer_bf16)(int64_t rows, int64_t width, const float* own, const float* info, int64_t ld, Bf16* out,
                        int64_t ld_out);

  void (*sigmoid)(int64_t n, const float* x, float* out);
};

// The kernels as built for one instruction set.
namespace baseline {
const InferenceKernels& inference_kernels();
}
namespace avx2 {
const InferenceKernels& inference_kernels();
}
namespace avx512 {
const InferenceKernels& inference_kernels();
}

const InferenceKernels& best_inference_kernels();

}  // namespace fastmtl
