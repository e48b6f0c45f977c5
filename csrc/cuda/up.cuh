// From z of a hidden layer to z of the next one, for Hopper's tensor cores: activations are made in the registers from
// which they are multiplied; mean and M2 (the sum of squared distances from it) of the next z over a run of rows are
// left for its BatchNorm (fastmtl/backends/triton/batch_norm.py).
//
// A program owns an expert and a run of rows; the weight stays in shared memory. A tile is 128 rows, 16 for each of
// eight warps, whose strips of it are their own. 64 columns of a strip are filled again, for the tile after the next,
// as soon as they are in registers, so that memory always has something to bring. The next z leaves from a strip of its
// own.
//
// Sums in fp32, operands bf16; deterministic.
#pragma once

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/strips.cuh"

namespace fastmtl::cuda {

constexpr int kUpThreads = 256, kUpRows = 128, kUpTiles = 2;
constexpr int kUpBelow = 256, kUpUnits = 128;  // units of the layer below, and of this one

struct Up {
  const char* below;   // [n_rows, pitch_below] bf16: z
  const float* stat;   // [4, pitch_below]: mean, 1 / sigma, gamma / sigma, beta
  const char* weight;  // [columns, pitch_weight] bf16
  char* z;             // [n_rows, pitch] bf16, written
  float* part;         // [runs, 2, pitch]
  int64_t pitch_below, pitch_weight, pitch;
  int32_t n_rows, run_rows, n_experts, n_below, n_units;
};

// Where things begin in shared memory. Matrices lie in rows of 128 bytes, 64 columns a block, swizzled.
struct UpRoom {
  static constexpr int of_weight = kUpUnits * 128, weights = 0;  // [units, below]
  static constexpr int z = weights + kUpBelow / 64 * of_weight, strip = kUpBelow / 64 * kStripBlock;
  static constexpr int tile = kUpThreads / 32 * strip;
  static constexpr int out = z + kUpTiles * tile, out_strip = kUpUnits / 64 * kStripBlock;
  static constexpr int numbers = out + kUpThreads / 32 * out_strip;
  static constexpr int bytes = numbers + static_cast<int>(sizeof(Normal<kUpBelow>));
};

// What a thread adds up of z: of its 32 columns, about its first row's (two of them in a number), which cancels at most
// as much as there is.
struct UpSums {
  uint32_t about[16];
  float total[32], square[32];
  int count;

  __device__ __forceinline__ float first(int column) const {
    return column % 2 == 0 ? lower(about[column / 2]) : upper(about[column / 2]);
  }
};

// The operands of four products: 64 columns of a strip, from `block` on, which become activations.
template <int ACT>
__device__ __forceinline__ void make_operands(const Normal<kUpBelow>& normal, int block, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) normal.template activate<ACT>(64 * block + 16 * s, a[s]);
}

// The next z of a strip, rounded. `left`: rows from the thread's first on.
__device__ __forceinline__ void add_up(uint32_t strip, int left, bool is_first, const float (&d)[64], UpSums& sums) {
  const bool there[2] = {left > 0, left > 8};
#pragma unroll
  for (int jj = 0; jj < kUpUnits / 16; ++jj) {
    uint32_t z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = packed(d[8 * jj + 2 * i], d[8 * jj + 2 * i + 1]);
    store_blocks(strip + strip_blocks(jj), z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = 4 * jj + i / 2 * 2;  // of the thread's columns
      if (i % 2 == 0 && is_first) sums.about[first / 2] = z[i];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float value = c == 0 ? lower(z[i]) : upper(z[i]);
        const float apart = there[i % 2] ? value - sums.first(first + c) : 0.0f;
        sums.total[first + c] += apart;
        sums.square[first + c] += apart * apart;
      }
    }
  }
  sums.count += (there[0] ? 1 : 0) + (there[1] ? 1 : 0);
}

// The sum over the eight lanes that have rows of the same columns.
__device__ __forceinline__ float of_lanes(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 4);
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 8);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 16);
}

// The program's mean and M2 from its threads' (Chan et al., 1979): those of a warp first.
__device__ __forceinline__ void leave_statistics(const Up& f, int expert, int run, int n_rows, float* memory,
                                                 const UpSums& sums) {
  constexpr int kWarps = kUpThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float *means = memory, *squares = memory + kWarps * kUpUnits, *counts = squares + kWarps * kUpUnits;
  const auto count = static_cast<float>(sums.count);
  const float of_warp = of_lanes(count);
  const float per_row = sums.count > 0 ? 1.0f / count : 0.0f, per_row_of_warp = of_warp > 0.0f ? 1.0f / of_warp : 0.0f;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float mean = sums.count > 0 ? sums.first(i) + sums.total[i] * per_row : 0.0f;
    const float m2 = sums.square[i] - sums.total[i] * (sums.total[i] * per_row);
    const float mean_of_warp = of_lanes(count * mean) * per_row_of_warp, apart = mean - mean_of_warp;
    const float m2_of_warp = of_lanes(sums.count > 0 ? m2 + apart * apart * count : 0.0f);
    const int at = warp * kUpUnits + i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (lane < 4) means[at] = mean_of_warp, squares[at] = m2_of_warp;
  }
  if (lane == 0) counts[warp] = of_warp;
  __syncthreads();
  const auto unit = static_cast<int>(threadIdx.x);
  if (unit >= f.n_units) return;
  float mean = 0.0f, m2 = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) mean += counts[w] * means[w * kUpUnits + unit];
  mean /= static_cast<float>(n_rows);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float apart = means[w * kUpUnits + unit] - mean;
    m2 += squares[w * kUpUnits + unit] + apart * apart * counts[w];
  }
  float* part = f.part + static_cast<int64_t>(run) * 2 * f.pitch + expert * f.n_units + unit;
  part[0] = mean;
  part[f.pitch] = m2;
}

template <int ACT>
__global__ void __launch_bounds__(kUpThreads, 1) up_kernel(const __grid_constant__ Up f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory);
  auto& normal = *reinterpret_cast<Normal<kUpBelow>*>(memory + UpRoom::numbers);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int expert = static_cast<int>(blockIdx.x) % f.n_experts, run = static_cast<int>(blockIdx.x) / f.n_experts;
  const int first_row = run * f.run_rows;
  const int n_rows = f.n_rows - first_row < f.run_rows ? f.n_rows - first_row : f.run_rows;
  const char* weight = f.weight + 2 * expert * f.n_units * f.pitch_weight;
  for (int at = thread; at < kUpUnits * kUpBelow / 8; at += kUpThreads) {
    const int unit = at / (kUpBelow / 8), piece = at % (kUpBelow / 8);
    const bool there = unit < f.n_units && 8 * piece < f.n_below;
    copy_16(room + UpRoom::weights + piece / 8 * UpRoom::of_weight + unit * 128 + ((piece % 8) ^ (unit % 8)) * 16,
            there ? weight + 2 * (unit * f.pitch_weight + 8 * piece) : f.weight, there ? 16 : 0);
  }
  const uint32_t strips = room + UpRoom::z + warp * UpRoom::strip, out = room + UpRoom::out + warp * UpRoom::out_strip;
  auto coming = StripRows::of<64>(f.below + 2 * (first_row * f.pitch_below + expert * f.n_below), f.pitch_below,
                                  kStripRows * warp, n_rows, f.n_below);
  auto leaving = StripRows::of<kUpUnits>(f.z + 2 * (first_row * f.pitch + expert * f.n_units), f.pitch,
                                         kStripRows * warp, n_rows, f.n_units);
  constexpr int kBlocks = kUpBelow / 64;
  // 64 columns of the strip of the tile that `coming` is at: a group of copies each
  const auto bring = [&](uint32_t strip, int block) {
    StripRows rows = coming;
    rows.at += 128 * block;
    if (64 * block + StripPieces<64>::column() >= f.n_below) rows.left = 0;
    bring_strip<64>(strip + block * kStripBlock, rows);
    copies_commit();
  };
  for (int i = 0; i < kUpTiles; ++i) {
    for (int block = 0; block < kBlocks; ++block) bring(strips + i * UpRoom::tile, block);
    coming.next(kUpRows, f.pitch_below);
  }
  static_assert(kUpThreads == kUpBelow);
  const float* stat = f.stat + expert * f.n_below + thread;
  normal.set(thread, thread < f.n_below ? stat : nullptr, f.pitch_below);
  copies_wait<kUpTiles * kBlocks - 1>();  // the weight, which goes with the first block
  writes_arrive();
  __syncthreads();
  UpSums sums;
#pragma unroll
  for (int i = 0; i < 32; ++i) sums.about[i / 2] = 0, sums.total[i] = sums.square[i] = 0.0f;
  sums.count = 0;
  const int mine = kStripRows * warp + thread % 32 / 4;  // the thread's first row of a tile
  for (int row = 0; row < n_rows; row += kUpRows) {
    const uint32_t strip = strips + row / kUpRows % kUpTiles * UpRoom::tile;
    float d[64];
    uint32_t operands[2][4][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t (&a)[4][4] = operands[block % 2];
      copies_wait<kUpTiles * kBlocks - 1>();
      __syncwarp(0xFFFFFFFFu);
#pragma unroll
      for (int s = 0; s < 4; ++s) load_blocks(a[s], strip + strip_blocks(4 * block + s));
      __syncwarp(0xFFFFFFFFu);
      bring(strip, block);
      make_operands<ACT>(normal, block, a);
      const uint64_t b = descriptor(room + UpRoom::weights + block * UpRoom::of_weight, 128, 1024);
#pragma unroll
      for (int s = 0; s < 4; ++s) held(a[s]);
      products_begin();
      if (block == 0) {
        multiply<true>(d, a[0], b);
      } else {
        multiply<false>(d, a[0], b);
      }
#pragma unroll
      for (int s = 1; s < 4; ++s) multiply<false>(d, a[s], further(b, 32 * s));
      products_commit();
      if (block > 0) products_wait<1>();
    }
    coming.next(kUpRows, f.pitch_below);
    products_wait<0>();
    held(d);
    __syncwarp(0xFFFFFFFFu);  // the last tile has left
    add_up(out, n_rows - row - mine, row == 0, d, sums);
    __syncwarp(0xFFFFFFFFu);
    leave_strip<kUpUnits>(out, leaving);
    leaving.next(kUpRows, f.pitch);
  }
  copies_arrive();
  __syncthreads();
  leave_statistics(f, expert, run, n_rows, reinterpret_cast<float*>(memory), sums);
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

}  // namespace fastmtl::cuda
