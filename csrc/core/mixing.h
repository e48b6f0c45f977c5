// Kernels that join the experts: the gates' softmax, the mix and its gradient, and the output layer.
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "core/elementwise.h"

namespace fastmtl::FASTMTL_ISA {

// Sixteen rows at a time, one in a lane: a gate has few columns, so a row alone would leave most lanes empty.
inline void gate_softmax(const Tile<float>& t, const GateView* gates, int64_t n_gates, float* weights, int64_t ld_w) {
  int64_t widest = 0;
  for (int64_t g = 0; g < n_gates; ++g) widest = std::max(widest, gates[g].fan_in);
  std::vector<float> scratch(static_cast<size_t>(widest * kLanes));
  for (int64_t start = 0; start < t.rows; start += kLanes) {
    const int64_t lanes = std::min(kLanes, t.rows - start);
    for (int64_t g = 0; g < n_gates; ++g) {
      const int64_t first = gates[g].column, fan_in = gates[g].fan_in;
      F32 top = splat(-std::numeric_limits<float>::infinity());
      for (int64_t k = 0; k < fan_in; ++k) {
        const int64_t c = first + k;
        F32 z{};
        for (int64_t i = 0; i < lanes; ++i) z[i] = t.z[(start + i) * t.ld + c];
        const F32 y = (z - t.mean[c]) * t.scale[c] + t.shift[c];
        top = select(y > top, y, top);
        store(&scratch[k * kLanes], y);
      }
      F32 total{};
      for (int64_t k = 0; k < fan_in; ++k) {
        const F32 e = exp(load(&scratch[k * kLanes]) - top);
        total += e;
        store(&scratch[k * kLanes], e);
      }
      for (int64_t k = 0; k < fan_in; ++k) {
        const F32 w = load(&scratch[k * kLanes]) / total;
        for (int64_t i = 0; i < lanes; ++i) weights[(start + i) * ld_w + first + k] = w[i];
      }
    }
  }
}

template <class T>
void mix(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, const float* weights, int64_t ld_w,
         const T* h, int64_t ld_h, float* const* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < n_gates; ++g) {
      const float* w = weights + r * ld_w + gates[g].column;
      for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
        F32 total{};
        for (int64_t k = 0; k < gates[g].fan_in; ++k) {
          total += w[k] * load(h + r * ld_h + gates[g].experts[k] * width + c, n);
        }
        store(out[g] + r * ld_out + c, total, n);
      });
    }
  }
}

// One expert's row in kCount of the mixes that it goes into: the gradient of h, added up where it is not the first of
// them, and of its weight in each.
template <int kCount, class T>
FASTMTL_INLINE void mix_grad_row(const int64_t* mixers, const float* w, const T* h, const float* const* dout,
                                 int64_t at, int64_t width, float* dh, bool first, float* s) {
  F32 dots[kCount] = {};
  for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const F32 value = load(h + c, n);
    F32 total = first ? F32{} : load(dh + c, n);
    for (int m = 0; m < kCount; ++m) {
      const F32 d = load(dout[mixers[2 * m]] + at + c, n);
      dots[m] += value * d;
      total += w[mixers[2 * m + 1]] * d;
    }
    store(dh + c, total, n);
  });
  for (int m = 0; m < kCount; ++m) s[mixers[2 * m + 1]] = sum(dots[m]);
}

template <class T>
void mix_grad(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, int64_t n_experts,
              const int64_t* starts, const int64_t* mixers, const float* weights, int64_t ld_w, const T* h,
              int64_t ld_h, const float* const* dout, int64_t ld_dout, float* dh, int64_t ld_dh, float* ds,
              int64_t ld_ds) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* w = weights + r * ld_w;
    float* s = ds + r * ld_ds;
    for (int64_t e = 0; e < n_experts; ++e) {
      float* to = dh + r * ld_dh + e * width;
      const T* from = h + r * ld_h + e * width;
      int64_t m = starts[e];
      if (m == starts[e + 1]) std::fill_n(to, width, 0.0f);
      for (; m + 2 <= starts[e + 1]; m += 2) {
        mix_grad_row<2>(mixers + 2 * m, w, from, dout, r * ld_dout, width, to, m == starts[e], s);
      }
      if (m < starts[e + 1]) {
        mix_grad_row<1>(mixers + 2 * m, w, from, dout, r * ld_dout, width, to, m == starts[e], s);
      }
    }
    for (int64_t g = 0; g < n_gates; ++g) {
      const int64_t first = gates[g].column, fan_in = gates[g].fan_in;
      int64_t top = 0;
      for (int64_t k = 0; k < fan_in; ++k) {
        if (w[first + k] > w[first + top]) top = k;
      }
      // about the heaviest expert's: a gate that is almost sure of it leaves nothing else of its gradient
      const float about = s[first + top];
      float pull = 0;
      for (int64_t k = 0; k < fan_in; ++k) pull += w[first + k] * (s[first + k] - about);
      for (int64_t k = 0; k < fan_in; ++k) s[first + k] = w[first + k] * (s[first + k] - about - pull);
    }
  }
}

template <class T>
void logits(int64_t rows, int64_t width, int64_t n_experts, const T* h, int64_t ld_h, const float* weight,
            const float* bias, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t e = 0; e < n_experts; ++e) {
      out[r * ld_out + e] = dot(h + r * ld_h + e * width, weight + e * width, width) + bias[e];
    }
  }
}

template <class T>
void logits_grad(int64_t rows, int64_t width, int64_t n_experts, const T* h, int64_t ld_h, const float* weight,
                 const float* dout, int64_t ld_dout, float* dh, int64_t ld_dh, double* dweight, double* dbias) {
  for (int64_t e = 0; e < n_experts; ++e) {
    for (int64_t r = 0; r < rows; ++r) dbias[e] += static_cast<double>(dout[r * ld_dout + e]);
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const F32 w = load(weight + e * width + c, n);
      F64 total{};
      for (int64_t r = 0; r < rows; ++r) {
        const float d = dout[r * ld_dout + e];
        total += wide(d * load(h + r * ld_h + e * width + c, n));
        store(dh + r * ld_dh + e * width + c, d * w, n);
      }
      add_to(dweight + e * width + c, total, n);
    });
  }
}

}  // namespace fastmtl::FASTMTL_ISA
