// The products with packed weights for ONE instruction set: built once for each, with FASTMTL_ISA naming it.
#include "core/packed_gemm.h"

#include "core/packed_gemm_amx.h"
#include "core/packed_gemm_bf16.h"

#define FASTMTL_TEXT(x) #x
#define FASTMTL_NAME(x) FASTMTL_TEXT(x)

namespace fastmtl::FASTMTL_ISA {
namespace {

void wgrad_bf16(int64_t m, int64_t n, int64_t k, const Bf16* dz, int64_t ld_dz, const Bf16* h, int64_t ld_h, float* dw,
                int64_t ld_dw, bool accumulate, Bf16* scratch, const Ahead* ahead) {
  const int64_t ld = stretch_stride(m);
  Bf16* packed = scratch + n * ld;
  int64_t row = 0;
  do {
    const int64_t rows = std::min(kStretchRows, m - row);
    transpose_bf16(rows, n, dz + row * ld_dz, ld_dz, scratch, ld);
    repack_bf16(k, rows, h + row * ld_h, ld_h, true, packed);
    gemm_bf16(n, k, rows, scratch, ld, packed, dw, ld_dw, accumulate || row > 0, ahead);
    row += rows;
  } while (row < m);
}

}  // namespace

const PackedGemm& packed_gemm() {
#ifdef __AVX512BF16__
  constexpr bool kHasBf16 = true;
#else
  constexpr bool kHasBf16 = false;
#endif
  static const PackedGemm table = {FASTMTL_NAME(FASTMTL_ISA),
                                   kHasBf16,
                                   pack_f32,
                                   pack_bf16,
                                   repack_bf16,
                                   gemm_f32,
                                   gemm_bf16,
                                   wgrad_f32,
                                   wgrad_bf16,
                                   transpose_bf16,
                                   round_bf16};
  return table;
}

}  // namespace fastmtl::FASTMTL_ISA
