// Matrix products with one operand packed once and used often: a layer's weights, or one of the two operands of a
// weight's gradient. The table of the kernels, and how the best build of them is chosen.
//
// Layout      matrices are row-major with a row stride ("ld", in elements). A packed weight is cut into panels of
//             kPanel columns of the result, the last one filled up with zeros:
//               fp32  [n / 16 panels][k][16]
//               bf16  [n / 16 panels][k / 2 pairs][16][2], k filled up with zeros to a multiple of kPairDepth
//             It should lie on a cache line, and so should the rows of a bf16 operand: a tile is loaded by lines.
// Threading   none in here; a kernel keeps no state between calls.
// Accumulation fp32. bf16 products are exact; on processors with bf16 instructions numbers below 1.2e-38 count as zero.
// Determinism the order of a sum depends on the sizes m, n, k (and the instruction set) alone.
// Aliasing    the result must not overlap the operands.
// Bounds      nothing outside the matrices as described is read or written, whatever the sizes; any of them may be 0.
// Special     NaN and infinity go through as in the plain sum.
#pragma once

#include <cstdint>

namespace fastmtl {

using Bf16 = uint16_t;  // the upper half of a float

constexpr int64_t kPanel = 16;
constexpr int64_t kPairDepth = 32;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Elements of a packed weight.
constexpr int64_t packed_f32_size(int64_t n, int64_t k) { return round_up(n, kPanel) * k; }
constexpr int64_t packed_bf16_size(int64_t n, int64_t k) { return round_up(n, kPanel) * round_up(k, kPairDepth); }

// Rows of a batch that a weight's gradient takes at a time: both operands stay in the cache with the result.
constexpr int64_t kStretchRows = 512;

// Row stride of a transposed stretch of m rows at most: no power of two, which would use few sets of the cache.
constexpr int64_t stretch_stride(int64_t m) {
  return round_up(m < kStretchRows ? m : kStretchRows, kPairDepth) + kPairDepth;
}

// Elements that wgrad_bf16 wants as scratch.
constexpr int64_t wgrad_scratch_size(int64_t m, int64_t n, int64_t k) {
  return n * stretch_stride(m) + packed_bf16_size(k, stretch_stride(m));
}

// Memory that the work behind a product will want. A product is bound by its arithmetic and leaves the memory idle: it
// asks for these lines on its way. Advice, which changes no result.
struct Ahead {
  struct Part {
    const void* data;
    int64_t rows, row_bytes, stride_bytes;
  };
  static constexpr int kMost = 4;
  Part parts[kMost];
  int count = 0;
  void add(const Part& part) {
    if (part.rows > 0) parts[count++] = part;
  }
};

struct PackedGemm {
  const char* name;
  bool has_bf16;  // the processor multiplies bf16; otherwise a bf16 product costs a little more than one in fp32

  // Packs a weight: w is [n, k], or [k, n] where it is `by_depth`.
  void (*pack_f32)(int64_t n, int64_t k, const float* w, int64_t ld, bool by_depth, float* packed);
  void (*pack_bf16)(int64_t n, int64_t k, const float* w, int64_t ld, bool by_depth, Bf16* packed);  // rounds
  void (*repack_bf16)(int64_t n, int64_t k, const Bf16* w, int64_t ld, bool by_depth, Bf16* packed);

  // c [m, n] = a [m, k] times the packed weight, plus c where it accumulates. `ahead` may be null.
  void (*gemm_f32)(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, const float* packed, float* c,
                   int64_t ld_c, bool accumulate, const Ahead* ahead);
  void (*gemm_bf16)(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t ld_a, const Bf16* packed, float* c,
                    int64_t ld_c, bool accumulate, const Ahead* ahead);

  // dw [n, k] = dz^T h, plus dw where it accumulates; dz is [m, n], h is [m, k]. Both are read as they lie.
  void (*wgrad_f32)(int64_t m, int64_t n, int64_t k, const float* dz, int64_t ld_dz, const float* h, int64_t ld_h,
                    float* dw, int64_t ld_dw, bool accumulate);

  // The same in bf16. `scratch` on a cache line, `ahead` may be null. It transposes dz and packs h; where n is much
  // larger than k, swapping the two and taking dw transposed costs less.
  void (*wgrad_bf16)(int64_t m, int64_t n, int64_t k, const Bf16* dz, int64_t ld_dz, const Bf16* h, int64_t ld_h,
                     float* dw, int64_t ld_dw, bool accumulate, Bf16* scratch, const Ahead* ahead);

  // to [cols, ld_to] = from^T, each row filled up with zeros to a multiple of kPairDepth rows of `from`.
  void (*transpose_bf16)(int64_t rows, int64_t cols, const Bf16* from, int64_t ld, Bf16* to, int64_t ld_to);

  // Rounds to nearest, ties to even.
  void (*round_bf16)(int64_t rows, int64_t cols, const float* from, int64_t ld, Bf16* to, int64_t ld_to);
};

// The kernels as built for one instruction set.
namespace baseline {
const PackedGemm& packed_gemm();
}
namespace avx2 {
const PackedGemm& packed_gemm();
}
namespace avx512 {
const PackedGemm& packed_gemm();
}
namespace avx512_bf16 {
const PackedGemm& packed_gemm();
}
namespace amx {
const PackedGemm& packed_gemm();
}

// The best build that this processor (and, for amx, this system) runs; FASTMTL_ISA asks for one by name.
const PackedGemm& best_packed_gemm();

}  // namespace fastmtl
