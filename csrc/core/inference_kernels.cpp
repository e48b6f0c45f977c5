// The kernels of inference for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include "core/inference_kernels.h"

#include <cmath>
#include <vector>

#include "core/elementwise.h"
#include "core/packed_gemm_pack.h"
#include "core/row_activations.h"

namespace fastmtl::FASTMTL_ISA {
namespace {

template <class Act, class T>
void each(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, T* h, int64_t ld_h) {
  for (int64_t r = 0; r < rows; ++r) {
    for_columns(bend.cols, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const F32 alpha = bend.alpha ? load(bend.alpha + c, n) : F32{};
      store(h + r * ld_h + c, Act::forward(load(z + r * ld_z + c, n) + load(bend.bias + c, n), alpha), n);
    });
  }
}

template <class Act, class T>
void whole_rows(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, T* h, int64_t ld_h) {
  std::vector<float> y(static_cast<size_t>(bend.width)), value(static_cast<size_t>(bend.width));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < bend.cols; first += bend.width) {
      for_columns(bend.width, [&](int64_t c, auto n) __attribute__((always_inline)) {
        store(&y[c], load(z + r * ld_z + first + c, n) + load(bend.bias + first + c, n), n);
      });
      Act::forward(y.data(), bend.alpha ? bend.alpha + first : nullptr, bend.width, value.data());
      for_columns(bend.width, [&](int64_t c, auto n) __attribute__((always_inline)) {
        store(h + r * ld_h + first + c, load(&value[c], n), n);
      });
    }
  }
}

template <class T>
void activate(const Bend& bend, int64_t rows, const float* z, int64_t ld_z, T* h, int64_t ld_h) {
  switch (bend.activation) {
    case kRelu:
      return each<Relu>(bend, rows, z, ld_z, h, ld_h);
    case kSigmoid:
      return each<Sigmoid>(bend, rows, z, ld_z, h, ld_h);
    case kLeakyRelu:
      return each<LeakyRelu>(bend, rows, z, ld_z, h, ld_h);
    case kPRelu:
      return each<PRelu>(bend, rows, z, ld_z, h, ld_h);
    case kDice:
      return whole_rows<DiceRow>(bend, rows, z, ld_z, h, ld_h);
    case kSoftmax:
      return whole_rows<SoftmaxRow>(bend, rows, z, ld_z, h, ld_h);
    case kTanh:
      return each<Tanh>(bend, rows, z, ld_z, h, ld_h);
    case kGelu:
      return each<Gelu>(bend, rows, z, ld_z, h, ld_h);
    case kSilu:
      return each<Silu>(bend, rows, z, ld_z, h, ld_h);
    default:
      return each<Linear>(bend, rows, z, ld_z, h, ld_h);
  }
}

template <class T>
void mix_of(const GateView* gates, int64_t n_gates, int64_t rows, int64_t width, const float* weights, int64_t ld_w,
            const T* h, int64_t ld_h, T* const* out, int64_t ld_out) {
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

// The softmax of two scores is a sigmoid of their difference.
template <class T>
void transfer_of(int64_t rows, int64_t width, const float* own, const float* info, int64_t ld, T* out, int64_t ld_out) {
  const float root = std::sqrt(static_cast<float>(width));
  for (int64_t r = 0; r < rows; ++r) {
    const float *a = own + r * ld, *b = info + r * ld;
    const float score = (dot(a, a + width, width) - dot(b, b + width, width)) / root;
    const float first = sigmoid(splat(score))[0], second = sigmoid(splat(-score))[0];
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      store(out + r * ld_out + c, first * load(a + 2 * width + c, n) + second * load(b + 2 * width + c, n), n);
    });
  }
}

void sigmoid_of(int64_t n, const float* x, float* out) {
  for_columns(n, [&](int64_t c, auto lanes)
                     __attribute__((always_inline)) { store(out + c, sigmoid(load(x + c, lanes)), lanes); });
}

}  // namespace

const InferenceKernels& inference_kernels() {
  static const InferenceKernels table = {activate<float>,    activate<Bf16>,    mix_of<float>, mix_of<Bf16>,
                                         transfer_of<float>, transfer_of<Bf16>, sigmoid_of};
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
