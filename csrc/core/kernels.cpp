// The kernels of expert_gate in fp32 for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include "core/kernels.h"

#include "core/folded_tables.h"
#include "core/picked_rows.h"
#include "core/small_gemm.h"
#include "core/task_losses.h"
#include "core/tile_kernels.h"

#define FASTMTL_TEXT(x) #x
#define FASTMTL_NAME(x) FASTMTL_TEXT(x)

namespace fastmtl::FASTMTL_ISA {

const Kernels& kernels() {
  static const Kernels table = {
      FASTMTL_NAME(FASTMTL_ISA), small_gemm, fold, fold_grad, add_up, gate_softmax, task_losses};
  return table;
}

const TileKernels<float>& tile_kernels_f32() {
  static const TileKernels<float> table = tile_kernels_of<float>();
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
