// The kernels of expert_gate for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include "core/kernels.h"

#include "core/elementwise.h"
#include "core/mixing.h"
#include "core/row_activations.h"
#include "core/small_gemm.h"
#include "core/task_losses.h"

#define FASTMTL_TEXT(x) #x
#define FASTMTL_NAME(x) FASTMTL_TEXT(x)

namespace fastmtl::FASTMTL_ISA {
namespace {

template <class Act>
void hidden_of(const Tile& t, float* h, int64_t ld_h) {
  if (t.dropout.on) {
    hidden_elementwise<Act, true>(t, h, ld_h);
  } else {
    hidden_elementwise<Act, false>(t, h, ld_h);
  }
}

void hidden(const Tile& t, float* h, int64_t ld_h) {
  switch (t.activation) {
    case kRelu:
      return hidden_of<Relu>(t, h, ld_h);
    case kSigmoid:
      return hidden_of<Sigmoid>(t, h, ld_h);
    case kLeakyRelu:
      return hidden_of<LeakyRelu>(t, h, ld_h);
    case kPRelu:
      return hidden_of<PRelu>(t, h, ld_h);
    case kDice:
      return hidden_rows<DiceRow>(t, h, ld_h);
    case kSoftmax:
      return hidden_rows<SoftmaxRow>(t, h, ld_h);
    case kTanh:
      return hidden_of<Tanh>(t, h, ld_h);
    case kGelu:
      return hidden_of<Gelu>(t, h, ld_h);
    case kSilu:
      return hidden_of<Silu>(t, h, ld_h);
    default:
      return hidden_of<Linear>(t, h, ld_h);
  }
}

template <class Act>
void hidden_grad_of(const Tile& t, const float* dh, int64_t ld_dh, float* dy, int64_t ld_dy, const GradSums& sums,
                    float* h, int64_t ld_h) {
  const auto run = t.dropout.on ? hidden_grad_elementwise<Act, true> : hidden_grad_elementwise<Act, false>;
  run(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
}

void hidden_grad(const Tile& t, const float* dh, int64_t ld_dh, float* dy, int64_t ld_dy, const GradSums& sums,
                 float* h, int64_t ld_h) {
  switch (t.activation) {
    case kRelu:
      return hidden_grad_of<Relu>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kSigmoid:
      return hidden_grad_of<Sigmoid>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kLeakyRelu:
      return hidden_grad_of<LeakyRelu>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kPRelu:
      return hidden_grad_of<PRelu>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kDice:
      return hidden_grad_rows<DiceRow>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kSoftmax:
      return hidden_grad_rows<SoftmaxRow>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kTanh:
      return hidden_grad_of<Tanh>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kGelu:
      return hidden_grad_of<Gelu>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    case kSilu:
      return hidden_grad_of<Silu>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
    default:
      return hidden_grad_of<Linear>(t, dh, ld_dh, dy, ld_dy, sums, h, ld_h);
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {FASTMTL_NAME(FASTMTL_ISA),
                                small_gemm,
                                column_stats,
                                hidden,
                                hidden_grad,
                                linear_grad<float>,
                                linear_grad<Bf16>,
                                gate_softmax,
                                mix,
                                mix_grad,
                                logits,
                                logits_grad,
                                task_losses};
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
