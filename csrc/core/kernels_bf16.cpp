// The kernels over activations in bf16 for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include "core/tile_kernels.h"

namespace fastmtl::FASTMTL_ISA {

const TileKernels<Bf16>& tile_kernels_bf16() {
  static const TileKernels<Bf16> table = tile_kernels_of<Bf16>();
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
