// dW = dz^T h of a hidden layer's weight, for Hopper's tensor cores, from z of the layer below: its activations h are
// made in shared memory, where products read them. Over a run of rows; the runs are added up behind it.
//
// A program owns an expert and a run of rows. A tile of 64 rows comes while others are multiplied, in a ring of
// kWeightTiles: dz for both warpgroups, which have half of its columns each, z for each warp a strip, 16 rows of half
// of the units.
//
// Sums in fp32, operands bf16; deterministic.
#pragma once

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/strips.cuh"

namespace fastmtl::cuda {

constexpr int kWeightThreads = 256, kWeightTiles = 4, kWeightRows = TileRows::kRows;
constexpr int kWeightBelow = 256, kWeightAbove = TileRows::kColumns;  // units below, and of the layer

struct WeightGradient {
  const char* dz;     // [n_rows, pitch_above] bf16
  const char* below;  // [n_rows, pitch] bf16: z
  const float* stat;  // [4, pitch]: mean, 1 / sigma, gamma / sigma, beta
  float* parts;       // [runs, n_experts, n_above, n_below]
  int64_t pitch, pitch_above;
  int32_t n_rows, run_rows, n_experts, n_below, n_above;
};

// Where things begin in shared memory. Matrices lie in rows of 128 bytes, 64 columns a block, swizzled.
struct WeightRoom {
  static constexpr int strip = kWeightBelow / 2 / 64 * kStripBlock, z = TileRows::kBytes;  // within a tile
  static constexpr int tile = z + kWeightThreads / 32 * strip;
  static constexpr int numbers = kWeightTiles * tile;
  static constexpr int bytes = numbers + static_cast<int>(sizeof(Normal<kWeightBelow>));
};

template <int ACT>
__global__ void __launch_bounds__(kWeightThreads, 1) weight_gradient_kernel(const __grid_constant__ WeightGradient f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kHalf = kWeightBelow / 2;
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory);
  auto& normal = *reinterpret_cast<Normal<kWeightBelow>*>(memory + WeightRoom::numbers);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread / 128;
  const int expert = static_cast<int>(blockIdx.x) % f.n_experts, run = static_cast<int>(blockIdx.x) / f.n_experts;
  const int first_row = run * f.run_rows;
  const int n_rows = f.n_rows - first_row < f.run_rows ? f.n_rows - first_row : f.run_rows;
  TileRows above(f.dz + 2 * (first_row * f.pitch_above + expert * f.n_above), f.pitch_above, n_rows, f.n_above);
  const int unit = kHalf * group;  // the first of the warp's strips
  auto below = StripRows::of<kHalf>(f.below + 2 * (first_row * f.pitch + expert * f.n_below + unit), f.pitch,
                                    kStripRows * (warp % 4), n_rows, f.n_below - unit);
  const auto bring = [&](int slot) {
    const uint32_t tile = room + slot * WeightRoom::tile;
    above.bring(tile);
    bring_strip<kHalf>(tile + WeightRoom::z + warp * WeightRoom::strip, below);
    below.next(kWeightRows, f.pitch);
    copies_commit();
  };
  // The activations of a tile that has come, in place of z; of rows that are not there dz is 0.
  const auto activate = [&](int slot) {
    copies_wait<kWeightTiles - 2>();
    __syncwarp(0xFFFFFFFFu);
#pragma unroll
    for (int jj = 0; jj < kHalf / 16; ++jj) {
      const uint32_t block =
          room + slot * WeightRoom::tile + WeightRoom::z + warp * WeightRoom::strip + strip_blocks(jj);
      uint32_t z[4];
      load_blocks(z, block);
      normal.template activate<ACT>(unit + 16 * jj, z);
      store_blocks(block, z);
    }
    writes_arrive();
  };
  for (int i = 0; i < kWeightTiles; ++i) bring(i);
  static_assert(kWeightThreads == kWeightBelow);
  normal.set(thread, thread < f.n_below ? f.stat + expert * f.n_below + thread : nullptr, f.pitch);
  __syncthreads();
  activate(0);
  __syncthreads();
  float dw[2][64];
#pragma unroll
  for (int i = 0; i < 128; ++i) dw[i / 64][i % 64] = 0.0f;
  int slot = 0;
  for (int row = 0; row < n_rows; row += kWeightRows) {
    const uint32_t tile = room + slot * WeightRoom::tile, strips = tile + WeightRoom::z;
    held(dw[0]), held(dw[1]), products_begin();
#pragma unroll
    for (int s = 0; s < kWeightRows / 16; ++s) {
      const uint64_t a = descriptor_turned(tile + group * TileRows::kBlock + s * 2048, 1024, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_turned(dw[half], a, descriptor_turned(strips + (4 * half + s) * WeightRoom::strip, 1024, kStripBlock));
      }
    }
    products_commit();
    const int after = slot + 1 == kWeightTiles ? 0 : slot + 1;
    activate(after);
    products_wait<0>();
    held(dw[0]), held(dw[1]);
    __syncthreads();  // all of the next tile is there, and nobody multiplies this one any more
    bring(slot);
    slot = after;
  }
  copies_arrive();
  float* part = f.parts + static_cast<int64_t>(run * f.n_experts + expert) * f.n_above * f.n_below;
  const int column = 64 * group + 16 * (warp % 4) + thread % 32 / 4;  // of dz: this one, and eight further
#pragma unroll
  for (int i = 0; i < 128; i += 2) {
    const int m = column + i / 2 % 2 * 8, n = i / 64 * kHalf + i % 64 / 4 * 8 + 2 * (thread % 4);
    if (m < f.n_above && n < f.n_below)
      *reinterpret_cast<float2*>(part + m * f.n_below + n) = make_float2(dw[i / 64][i % 64], dw[i / 64][i % 64 + 1]);
  }
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

}  // namespace fastmtl::cuda
