// The table of the kernels over tiles, for activations that are kept as T.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include <algorithm>

#include "core/elementwise.h"
#include "core/kernels.h"
#include "core/mixing.h"
#include "core/picked_rows.h"
#include "core/row_activations.h"

namespace fastmtl::FASTMTL_ISA {

// f(part of the tile, its first row) for a few rows after the others: what lies on neighbouring lines of memory is then
// asked for within a short time, whatever the order in the part.
template <class T, class F>
void by_blocks(const Tile<T>& t, const F& f) {
  for (int64_t start = 0; start < t.rows; start += kBlock) {
    Tile<T> part = t;
    part.rows = std::min(kBlock, t.rows - start);
    part.z += start * t.ld;
    part.first_row += start;
    f(part, start);
  }
}

// f(the activation's type).
template <class F>
void with_activation(int64_t activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f(Relu{});
    case kSigmoid:
      return f(Sigmoid{});
    case kLeakyRelu:
      return f(LeakyRelu{});
    case kPRelu:
      return f(PRelu{});
    case kDice:
      return f(DiceRow{});
    case kSoftmax:
      return f(SoftmaxRow{});
    case kTanh:
      return f(Tanh{});
    case kGelu:
      return f(Gelu{});
    case kSilu:
      return f(Silu{});
    default:
      return f(Linear{});
  }
}

template <class T, class H>
void hidden(const Tile<T>& t, H* h, int64_t ld_h) {
  with_activation(t.activation, [&]<class Act>(Act) {
    by_blocks(t, [&](const Tile<T>& part, int64_t start) {
      H* to = h + start * ld_h;
      if constexpr (Act::kRow) {
        hidden_rows<Act>(part, to, ld_h);
      } else if (t.dropout.on) {
        hidden_elementwise<Act, true>(part, to, ld_h);
      } else {
        hidden_elementwise<Act, false>(part, to, ld_h);
      }
    });
  });
}

template <class T>
void hidden_grad(const Tile<T>& t, const float* dh, int64_t ld_dh, T* dy, int64_t ld_dy, const GradSums& sums) {
  with_activation(t.activation, [&]<class Act>(Act) {
    by_blocks(t, [&](const Tile<T>& part, int64_t start) {
      const float* from = dh + start * ld_dh;
      T* to = dy + start * ld_dy;
      if constexpr (Act::kRow) {
        hidden_grad_rows<Act>(part, from, ld_dh, to, ld_dy, sums);
      } else if (t.dropout.on) {
        hidden_grad_elementwise<Act, true>(part, from, ld_dh, to, ld_dy, sums);
      } else {
        hidden_grad_elementwise<Act, false>(part, from, ld_dh, to, ld_dy, sums);
      }
    });
  });
}

template <class T>
void linear_grad(const Tile<T>& t, const T* dy, int64_t ld_dy, const double* mean_dy, const double* slope, T* dz,
                 int64_t ld_dz) {
  by_blocks(t, [&](const Tile<T>& part, int64_t start) {
    linear_grad_rows(part, dy + start * ld_dy, ld_dy, mean_dy, slope, dz + start * ld_dz, ld_dz);
  });
}

template <class T>
constexpr TileKernels<T> tile_kernels_of() {
  return {column_stats<T>, hidden<T, T>, hidden<T, float>, hidden_grad<T>, linear_grad<T>,
          mix<T>,          mix_grad<T>,  sum_by_pick<T>,   logits<T>,      logits_grad<T>};
}

}  // namespace fastmtl::FASTMTL_ISA
