// The gradient dz of a hidden layer back to the layer below, for Hopper's tensor cores: dh = dz W stays in registers,
// where it becomes D, the gradient of that layer's BatchNorm's output. Once for the sums of D over a run of rows; and,
// when these are added up (fastmtl/backends/triton/batch_norm.py), once more for dz of that layer. It multiplies twice,
// and neither dh nor D goes through memory.
//
// A program owns an expert, kDownUnits of its units and a run of rows; the weight stays in shared memory. Two
// warpgroups have half of the units each. A tile of 64 rows is multiplied while the one before it is worked on: dz
// comes for both warpgroups, in a ring of kDownTiles; a warp's strip of z is filled again, or written to memory, as
// soon as that warp has read it.
//
// Sums in fp32, operands bf16; deterministic.
#pragma once

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/strips.cuh"

namespace fastmtl::cuda {

constexpr int kDownThreads = 256, kDownTiles = 3;
constexpr int kDownRows = TileRows::kRows, kDownUnits = 256, kDownAbove = TileRows::kColumns,
              kDownHalf = kDownUnits / 2;

struct Down {
  const char* dz;      // [n_rows, pitch_above] bf16
  const char* weight;  // [columns above, pitch_weight] bf16
  const char* z;       // [n_rows, pitch] bf16
  const float* stat;   // [4, pitch]: mean, 1 / sigma, gamma / sigma, beta
  const float* coef;   // [2, pitch]: slope and shift; for dz
  float* part;         // [runs, n_sums, pitch]: the sums of D and of D times the normalised z; for sums
  char* out;           // [n_rows, pitch] bf16; for dz
  int64_t pitch, pitch_above, pitch_weight;
  int32_t n_rows, run_rows, n_experts, n_units, n_above, n_sums;

  __host__ __device__ __forceinline__ int blocks() const { return (n_units + kDownUnits - 1) / kDownUnits; }
};

// What columns need, of two neighbours side by side.
struct DownNumbers {
  Normal<kDownUnits> normal;
  float slope_shift[kDownUnits / 2][4];
};

// Where things begin in shared memory. Matrices lie in rows of 128 bytes, 64 columns a block, swizzled.
struct DownRoom {
  static constexpr int of_weight = kDownUnits * 128, weights = 0;  // [units, above]
  static constexpr int dz = weights + kDownAbove / 64 * of_weight;
  static constexpr int z = dz + kDownTiles * TileRows::kBytes, strip = kDownHalf / 64 * kStripBlock;
  static constexpr int tile_z = kDownThreads / 32 * strip;
  static constexpr int numbers = z + kDownTiles * tile_z;
  static constexpr int bytes = numbers + static_cast<int>(sizeof(DownNumbers));
};

// A program's part of the work.
struct DownPart {
  int expert, unit, run, first_row, n_rows;

  __device__ __forceinline__ explicit DownPart(const Down& f) {
    const int block = static_cast<int>(blockIdx.x) % (f.n_experts * f.blocks());
    run = static_cast<int>(blockIdx.x) / (f.n_experts * f.blocks());
    expert = block / f.blocks();
    unit = block % f.blocks() * kDownUnits;
    first_row = run * f.run_rows;
    n_rows = f.n_rows - first_row < f.run_rows ? f.n_rows - first_row : f.run_rows;
  }
};

// The weight's block [above, units] as products read it, its other side first.
__device__ __forceinline__ void bring_weight(const Down& f, const DownPart& part, uint32_t room) {
  const char* from = f.weight + 2 * (part.expert * f.n_above * f.pitch_weight + part.unit);
  // eight by eight numbers at a time
  for (auto at = static_cast<int>(threadIdx.x); at < kDownUnits / 8 * kDownAbove / 8; at += kDownThreads) {
    const int unit = at % (kDownUnits / 8) * 8, above = at / (kDownUnits / 8) * 8;
    uint32_t rows[8][4];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint4 row = make_uint4(0, 0, 0, 0);
      if (above + k < f.n_above && part.unit + unit < f.n_units)
        row = *reinterpret_cast<const uint4*>(from + 2 * ((above + k) * f.pitch_weight + unit));
      rows[k][0] = row.x, rows[k][1] = row.y, rows[k][2] = row.z, rows[k][3] = row.w;
    }
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      uint32_t turned[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t low = rows[2 * k][u / 2], high = rows[2 * k + 1][u / 2];
        turned[k] = u % 2 == 0 ? (low & 0xFFFFu) | high << 16 : low >> 16 | (high & 0xFFFF0000u);
      }
      store_shared(
          room + DownRoom::weights + above / 64 * DownRoom::of_weight + (unit + u) * 128 + ((above % 64 / 8) ^ u) * 16,
          make_uint4(turned[0], turned[1], turned[2], turned[3]));
    }
  }
}

template <bool SUM>
__device__ __forceinline__ void bring_numbers(const Down& f, const DownPart& part, DownNumbers& numbers) {
  static_assert(kDownThreads == kDownUnits);
  const auto unit = static_cast<int>(threadIdx.x);
  const bool inside = part.unit + unit < f.n_units;
  const int64_t column = part.expert * f.n_units + part.unit + unit;
  numbers.normal.set(unit, inside ? f.stat + column : nullptr, f.pitch);
  if constexpr (!SUM) {
    numbers.slope_shift[unit / 2][unit % 2] = inside ? f.coef[column] : 0.0f;
    numbers.slope_shift[unit / 2][2 + unit % 2] = inside ? f.coef[f.pitch + column] : 0.0f;
  }
}

// dh of the ring's slot-th tile for this warpgroup: 64 rows, its half of the units.
__device__ __forceinline__ void multiply_tile(float (&dh)[64], uint32_t room, int slot) {
  const uint64_t dz = descriptor(room + DownRoom::dz + slot * TileRows::kBytes, 128, 1024);
  const uint64_t weight = descriptor(room + DownRoom::weights + threadIdx.x / 128 * kDownHalf * 128, 128, 1024);
  products_begin();
  multiply<true>(dh, dz, weight);
#pragma unroll
  for (int s = 1; s < kDownAbove / 16; ++s) {
    multiply<false>(dh, further(dz, s / 4 * TileRows::kBlock + s % 4 * 32),
                    further(weight, s / 4 * DownRoom::of_weight + s % 4 * 32));
  }
  products_commit();
}

// D of a strip from dh: into the thread's sums of D and of D (z - mean) for its 32 columns, or on to dz, which takes
// the place of z.
template <int ACT, bool SUM>
__device__ __forceinline__ void work_on(uint32_t strip, const DownNumbers& numbers, const float (&dh)[64],
                                        float (&sums)[2][32]) {
  const int pair = static_cast<int>(threadIdx.x) / 128 * (kDownHalf / 2) + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int jj = 0; jj < kDownHalf / 16; ++jj) {
    uint32_t z[4];
    load_blocks(z, strip + strip_blocks(jj));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = pair + 8 * jj + 4 * j;
      const float4 known = *reinterpret_cast<const float4*>(numbers.normal.mean_scale[at]);
      const float2 beta = *reinterpret_cast<const float2*>(numbers.normal.beta[at]);
#pragma unroll
      for (int i = 2 * j; i < 2 * j + 2; ++i) {
        const float* mine = dh + 8 * jj + 2 * i;
        const float centred[2] = {lower(z[i]) - known.x, upper(z[i]) - known.y};
        const float d[2] = {activated_back<ACT>(centred[0] * known.z + beta.x, mine[0]),
                            activated_back<ACT>(centred[1] * known.w + beta.y, mine[1])};
        if constexpr (SUM) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {  // D is 0 in rows that are not there, as is their dz
            sums[0][4 * jj + 2 * j + c] += d[c];
            sums[1][4 * jj + 2 * j + c] += d[c] * centred[c];
          }
        } else {
          const float4 added = *reinterpret_cast<const float4*>(numbers.slope_shift[at]);
          z[i] = packed(((d[0] - added.z) - centred[0] * added.x) * known.z,
                        ((d[1] - added.w) - centred[1] * added.y) * known.w);
        }
      }
    }
    if constexpr (!SUM) store_blocks(strip + strip_blocks(jj), z);
  }
}

// The program's sums from its threads': over the eight lanes and four warps that have rows of the same columns.
__device__ __forceinline__ void leave_sums(const Down& f, const DownPart& part, float* of_warps,
                                           const float (&sums)[2][32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, half = threadIdx.x / 128;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float sum = sums[which][i];
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 8);
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
      if (lane < 4) of_warps[(2 * warp + which) * kDownUnits + kDownHalf * half + i / 2 * 8 + 2 * lane + i % 2] = sum;
    }
  }
  __syncthreads();
  const auto unit = static_cast<int>(threadIdx.x);
  if (part.unit + unit >= f.n_units) return;
  const int64_t column = part.expert * f.n_units + part.unit + unit;
  const float per_std[2] = {1.0f, f.stat[f.pitch + column]};
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += of_warps[(2 * w + which) * kDownUnits + unit];
    f.part[(static_cast<int64_t>(part.run) * f.n_sums + which) * f.pitch + column] = sum * per_std[which];
  }
}

template <int ACT, bool SUM>
__global__ void __launch_bounds__(kDownThreads, 1) down_kernel(const __grid_constant__ Down f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory);
  auto& numbers = *reinterpret_cast<DownNumbers*>(memory + DownRoom::numbers);
  const DownPart part(f);
  TileRows above(f.dz + 2 * (part.first_row * f.pitch_above + part.expert * f.n_above), f.pitch_above, part.n_rows,
                 f.n_above);
  const auto bring_dz = [&](int slot) { above.bring(room + DownRoom::dz + slot * TileRows::kBytes); };
  const int warp = static_cast<int>(threadIdx.x) / 32, unit = part.unit + kDownHalf * (warp / 4);
  const uint32_t strip = room + DownRoom::z + warp * DownRoom::strip;
  const auto rows_of = [&](const char* matrix) {
    return StripRows::of<kDownHalf>(matrix + 2 * (part.first_row * f.pitch + part.expert * f.n_units + unit), f.pitch,
                                    kStripRows * (warp % 4), part.n_rows, f.n_units - unit);
  };
  StripRows coming = rows_of(f.z), leaving = rows_of(SUM ? f.z : f.out);
  const auto bring_z = [&](int slot) {
    bring_strip<kDownHalf>(strip + slot * DownRoom::tile_z, coming);
    coming.next(kDownRows, f.pitch);
    copies_commit();
  };
  // groups of copies: dz, then z, of each tile; dz of the first two goes with z of the first
  bring_dz(0);
  bring_dz(1);
  for (int i = 0; i < kDownTiles; ++i) bring_z(i);
  bring_weight(f, part, room);
  bring_numbers<SUM>(f, part, numbers);
  copies_wait<2>();
  writes_arrive();
  __syncthreads();
  float dh[2][64], sums[2][32];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i / 32][i % 32] = 0.0f;
  multiply_tile(dh[0], room, 0);
  products_wait<0>();
  held(dh[0]);
  int slot = 0;  // of the tile that is worked on
  const auto turn = [&](float (&now)[64], float (&next)[64]) {
    copies_wait<1>();  // dz of the next tile, and its z
    writes_arrive();
    __syncthreads();  // that of all threads; and nobody multiplies the tile before this one any more
    const int after = slot + 1 == kDownTiles ? 0 : slot + 1;
    bring_dz(after + 1 == kDownTiles ? 0 : after + 1);
    copies_commit();
    multiply_tile(next, room, after);
    const uint32_t mine = strip + slot * DownRoom::tile_z;
    work_on<ACT, SUM>(mine, numbers, now, sums);
    __syncwarp(0xFFFFFFFFu);
    if constexpr (!SUM) {
      leave_strip<kDownHalf>(mine, leaving);
      leaving.next(kDownRows, f.pitch);
    }
    bring_z(slot);
    products_wait<0>();
    held(next);
    slot = after;
  };
  // no conditions within, which would keep products from running beside other work: tiles behind the last are zero
  for (int row = part.n_rows; row > 0; row -= 2 * kDownRows) {
    turn(dh[0], dh[1]);
    turn(dh[1], dh[0]);
  }
  if constexpr (SUM) {
    copies_arrive();
    __syncthreads();
    leave_sums(f, part, reinterpret_cast<float*>(memory), sums);
  }
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

}  // namespace fastmtl::cuda
