// The gradient dz of a hidden layer back to the layer below, for Hopper's tensor cores: dh = dz W stays in registers,
// where it becomes D, the gradient of that layer's BatchNorm's output. Once for the sums of D over a run of rows; and,
// when these are added up (fastmtl/backends/triton/batch_norm.py), once more for dz of that layer. It multiplies twice,
// and neither dh nor D goes through memory. The second time the weight's gradient dz^T h is made beside it, of
// activations h that are made of z once more: its parts, one a run, are added up behind it.
//
// A program owns an expert, kDownUnits of its units and a run of rows; the weight stays in shared memory. Two
// warpgroups have half of the units each, of the weight's gradient half of its rows. A tile of 64 rows is multiplied
// while the one before it is worked on, or leaves: dz comes for both warpgroups, in a ring; a warp's strip of z is
// filled again, or written to memory, as soon as that warp has read it.
//
// Sums in fp32, operands bf16; deterministic.
#pragma once

#include <cstdint>

#include "cuda/activation.cuh"
#include "cuda/strips.cuh"

namespace fastmtl::cuda {

constexpr int kDownThreads = 256;
constexpr int kDownDz = 3;  // tiles of dz that there is room for
constexpr int kDownRows = TileRows::kRows, kDownUnits = 256, kDownAbove = TileRows::kColumns,
              kDownHalf = kDownUnits / 2;

struct Down {
  const char* dz;      // [n_rows, pitch_above] bf16
  const char* weight;  // [columns above, pitch_weight] bf16
  const char* z;       // [n_rows, pitch] bf16
  const float* stat;   // [4, pitch]: mean, 1 / sigma, gamma / sigma, beta
  float* part;         // [runs, n_sums, pitch]: the sums of D and of D times the normalised z; for these
  const float* coef;   // [2, pitch]: slope and shift; for the gradients, as what follows
  char* out;           // [n_rows, pitch] bf16: dz of this layer
  float* of_weight;    // [runs, n_experts, n_above, n_units]: parts of the weight's gradient
  int64_t pitch, pitch_above, pitch_weight;
  int32_t n_rows, run_rows, n_experts, n_units, n_above, n_sums;

  __host__ __device__ __forceinline__ int blocks() const { return (n_units + kDownUnits - 1) / kDownUnits; }
};

// What columns need, of two neighbours side by side.
struct DownNumbers {
  Normal<kDownUnits> normal;
  float slope_shift[kDownUnits / 2][4];
};

// Where things begin in shared memory, with TILES of z and strips of activations beside them, if any. Matrices lie in
// rows of 128 bytes, 64 columns a block, swizzled.
template <int TILES, bool ACTIVATIONS>
struct DownRoom {
  static constexpr int of_weight = kDownUnits * 128, weights = 0;  // [units, above]
  static constexpr int dz = weights + kDownAbove / 64 * of_weight;
  static constexpr int z = dz + kDownDz * TileRows::kBytes, strip = kDownHalf / 64 * kStripBlock;
  static constexpr int tile = kDownThreads / 32 * strip;  // of z
  static constexpr int activations = z + TILES * tile;
  static constexpr int numbers = activations + (ACTIVATIONS ? tile : 0);
  static constexpr int bytes = numbers + static_cast<int>(sizeof(DownNumbers));
};
using SumsRoom = DownRoom<3, false>;
using GradientsRoom = DownRoom<2, true>;

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
          room + SumsRoom::weights + above / 64 * SumsRoom::of_weight + (unit + u) * 128 + ((above % 64 / 8) ^ u) * 16,
          make_uint4(turned[0], turned[1], turned[2], turned[3]));
    }
  }
}

template <bool GRADIENTS>
__device__ __forceinline__ void bring_numbers(const Down& f, const DownPart& part, DownNumbers& numbers) {
  static_assert(kDownThreads == kDownUnits);
  const auto unit = static_cast<int>(threadIdx.x);
  const bool inside = part.unit + unit < f.n_units;
  const int64_t column = part.expert * f.n_units + part.unit + unit;
  numbers.normal.set(unit, inside ? f.stat + column : nullptr, f.pitch);
  if constexpr (GRADIENTS) {
    numbers.slope_shift[unit / 2][unit % 2] = inside ? f.coef[column] : 0.0f;
    numbers.slope_shift[unit / 2][2 + unit % 2] = inside ? f.coef[f.pitch + column] : 0.0f;
  }
}

// dh of a tile for this warpgroup, which is queued: 64 rows, its half of the units.
__device__ __forceinline__ void multiply_tile(float (&dh)[64], uint32_t room, uint32_t tile) {
  const uint64_t dz = descriptor(tile, 128, 1024);
  const uint64_t weight = descriptor(room + SumsRoom::weights + threadIdx.x / 128 * kDownHalf * 128, 128, 1024);
  multiply<true>(dh, dz, weight);
#pragma unroll
  for (int s = 1; s < kDownAbove / 16; ++s) {
    multiply<false>(dh, further(dz, s / 4 * TileRows::kBlock + s % 4 * 32),
                    further(weight, s / 4 * SumsRoom::of_weight + s % 4 * 32));
  }
}

// What is known of four numbers of a strip: two rows of two neighbouring columns.
template <int ACT>
struct DownFour {
  float centred[2][2], y[2][2], d[2][2];  // z minus its mean, the BatchNorm's output and its gradient: by row, column
  float scale[2];

  __device__ __forceinline__ DownFour(const Normal<kDownUnits>& normal, int at, const uint32_t* z, const float* dh) {
    const float4 known = *reinterpret_cast<const float4*>(normal.mean_scale[at]);
    const float2 beta = *reinterpret_cast<const float2*>(normal.beta[at]);
    scale[0] = known.z, scale[1] = known.w;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      centred[r][0] = lower(z[r]) - known.x, centred[r][1] = upper(z[r]) - known.y;
      y[r][0] = centred[r][0] * known.z + beta.x, y[r][1] = centred[r][1] * known.w + beta.y;
#pragma unroll
      for (int c = 0; c < 2; ++c) d[r][c] = activated_back<ACT>(y[r][c], dh[2 * r + c]);
    }
  }
};

// Into the thread's sums of D and of D (z - mean) for its 32 columns; D is 0 in rows that are not there, as is their
// dz.
template <int ACT>
__device__ __forceinline__ void add_strip(uint32_t strip, const DownNumbers& numbers, const float (&dh)[64],
                                          float (&sums)[2][32]) {
  const int pair = static_cast<int>(threadIdx.x) / 128 * (kDownHalf / 2) + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int jj = 0; jj < kDownHalf / 16; ++jj) {
    uint32_t z[4];
    load_blocks(z, strip + strip_blocks(jj));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const DownFour<ACT> four(numbers.normal, pair + 8 * jj + 4 * j, z + 2 * j, dh + 8 * jj + 4 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0][4 * jj + 2 * j + i % 2] += four.d[i / 2][i % 2];
        sums[1][4 * jj + 2 * j + i % 2] += four.d[i / 2][i % 2] * four.centred[i / 2][i % 2];
      }
    }
  }
}

// dz of a strip in place of its z, and its activations.
template <int ACT>
__device__ __forceinline__ void turn_strip(uint32_t strip, uint32_t activations, const DownNumbers& numbers,
                                           const float (&dh)[64]) {
  const int pair = static_cast<int>(threadIdx.x) / 128 * (kDownHalf / 2) + static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int jj = 0; jj < kDownHalf / 16; ++jj) {
    uint32_t z[4], h[4];
    load_blocks(z, strip + strip_blocks(jj));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = pair + 8 * jj + 4 * j;
      const DownFour<ACT> four(numbers.normal, at, z + 2 * j, dh + 8 * jj + 4 * j);
      const float4 added = *reinterpret_cast<const float4*>(numbers.slope_shift[at]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        h[2 * j + r] = activated_pair<ACT>(four.y[r][0], four.y[r][1]);
        z[2 * j + r] = packed(((four.d[r][0] - added.z) - four.centred[r][0] * added.x) * four.scale[0],
                              ((four.d[r][1] - added.w) - four.centred[r][1] * added.y) * four.scale[1]);
      }
    }
    store_blocks(strip + strip_blocks(jj), z);
    store_blocks(activations + strip_blocks(jj), h);
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

// What both kernels read, tile by tile: dz for all threads, the warp's strip of z.
struct DownSources {
  TileRows above;
  StripRows below;

  __device__ __forceinline__ DownSources(const Down& f, const DownPart& part)
      : above(f.dz + 2 * (part.first_row * f.pitch_above + part.expert * f.n_above), f.pitch_above, part.n_rows,
              f.n_above),
        below(strip(f, part, f.z)) {}
  __device__ __forceinline__ static StripRows strip(const Down& f, const DownPart& part, const char* matrix) {
    const int warp = static_cast<int>(threadIdx.x) / 32, unit = part.unit + kDownHalf * (warp / 4);
    return StripRows::of<kDownHalf>(matrix + 2 * (part.first_row * f.pitch + part.expert * f.n_units + unit), f.pitch,
                                    kStripRows * (warp % 4), part.n_rows, f.n_units - unit);
  }
  __device__ __forceinline__ void bring_dz(uint32_t tile) {
    above.bring(tile);
    copies_commit();
  }
  __device__ __forceinline__ void bring_z(uint32_t strip, int64_t pitch) {
    bring_strip<kDownHalf>(strip, below);
    below.next(kDownRows, pitch);
    copies_commit();
  }
};

__device__ __forceinline__ int next_of(int slot, int n) { return slot + 1 == n ? 0 : slot + 1; }

template <int ACT>
__global__ void __launch_bounds__(kDownThreads, 1) down_sums_kernel(const __grid_constant__ Down f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Room = SumsRoom;
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory);
  auto& numbers = *reinterpret_cast<DownNumbers*>(memory + Room::numbers);
  const DownPart part(f);
  DownSources from(f, part);
  const uint32_t strip = room + Room::z + threadIdx.x / 32 * Room::strip;
  const auto dz_of = [&](int slot) { return room + Room::dz + slot * TileRows::kBytes; };
  // groups of copies: dz and z of each tile, two tiles of dz and three of z ahead
  from.bring_dz(dz_of(0));
  from.bring_dz(dz_of(1));
  for (int i = 0; i < 3; ++i) from.bring_z(strip + i * Room::tile, f.pitch);
  bring_weight(f, part, room);
  bring_numbers<false>(f, part, numbers);
  copies_wait<2>();
  writes_arrive();
  __syncthreads();
  float dh[2][64], sums[2][32];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i / 32][i % 32] = 0.0f;
  products_begin();
  multiply_tile(dh[0], room, dz_of(0));
  products_commit(), products_wait<0>(), held(dh[0]);
  int slot = 0;  // of the tile that is worked on
  const auto turn = [&](float (&now)[64], float (&next)[64]) {
    copies_wait<1>();  // dz of the next tile, and its z
    writes_arrive();
    __syncthreads();  // that of all threads; and nobody multiplies the tile before this one any more
    const int after = next_of(slot, 3);
    from.bring_dz(dz_of(next_of(after, 3)));
    products_begin();
    multiply_tile(next, room, dz_of(after));
    products_commit();
    add_strip<ACT>(strip + slot * Room::tile, numbers, now, sums);
    __syncwarp(0xFFFFFFFFu);
    from.bring_z(strip + slot * Room::tile, f.pitch);
    products_wait<0>();
    held(next);
    slot = after;
  };
  // no conditions within, which would keep products from running beside other work: tiles behind the last are zero
  for (int row = part.n_rows; row > 0; row -= 2 * kDownRows) {
    turn(dh[0], dh[1]);
    turn(dh[1], dh[0]);
  }
  copies_arrive();
  __syncthreads();
  // its part found again, not kept: there is no register for it meanwhile
  leave_sums(f, DownPart(f), reinterpret_cast<float*>(memory), sums);
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

template <int ACT>
__global__ void __launch_bounds__(kDownThreads, 1) down_gradients_kernel(const __grid_constant__ Down f) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Room = GradientsRoom;
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory);
  auto& numbers = *reinterpret_cast<DownNumbers*>(memory + Room::numbers);
  const DownPart part(f);
  DownSources from(f, part);
  StripRows leaving = DownSources::strip(f, part, f.out);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread / 128;
  const uint32_t strip = room + Room::z + warp * Room::strip, activations = room + Room::activations;
  const auto dz_of = [&](int slot) { return room + Room::dz + slot * TileRows::kBytes; };
  // groups of copies: dz of a tile, z of a tile, in turn; dz one tile further
  from.bring_dz(dz_of(0));
  from.bring_z(strip, f.pitch);
  from.bring_dz(dz_of(1));
  from.bring_z(strip + Room::tile, f.pitch);
  from.bring_dz(dz_of(2));
  bring_weight(f, part, room);
  bring_numbers<true>(f, part, numbers);
  copies_wait<3>();
  writes_arrive();
  __syncthreads();
  float dh[64], dw[2][64];  // of the weight this warpgroup has 64 rows, units of both halves
#pragma unroll
  for (int i = 0; i < 128; ++i) dw[i / 64][i % 64] = 0.0f;
  products_begin();
  multiply_tile(dh, room, dz_of(0));
  products_commit(), products_wait<0>(), held(dh);
  turn_strip<ACT>(strip, activations + warp * Room::strip, numbers, dh);
  copies_wait<2>();
  writes_arrive();
  __syncthreads();
  int slot = 0, place = 0;  // of the tile that was turned: its dz, and its strips
  for (int row = 0; row < part.n_rows; row += kDownRows) {
    const int after = next_of(slot, kDownDz);
    held(dw[0]), held(dw[1]), products_begin();
#pragma unroll
    for (int s = 0; s < kDownRows / 16; ++s) {
      const uint64_t a = descriptor_turned(dz_of(slot) + group * TileRows::kBlock + s * 2048, 1024, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_turned(dw[half], a, descriptor_turned(activations + (4 * half + s) * Room::strip, 1024, kStripBlock));
      }
    }
    multiply_tile(dh, room, dz_of(after));
    products_commit();
    __syncwarp(0xFFFFFFFFu);
    const uint32_t mine = strip + place * Room::tile;
    leave_strip<kDownHalf>(mine, leaving);
    leaving.next(kDownRows, f.pitch);
    from.bring_z(mine, f.pitch);
    products_wait<0>();
    held(dw[0]), held(dw[1]), held(dh);
    __syncthreads();  // nobody multiplies this tile's dz and activations any more
    from.bring_dz(dz_of(slot));
    copies_wait<3>();  // z of the next tile
    __syncwarp(0xFFFFFFFFu);
    place ^= 1;
    turn_strip<ACT>(strip + place * Room::tile, activations + warp * Room::strip, numbers, dh);
    copies_wait<2>();  // dz of the one behind it
    writes_arrive();
    __syncthreads();
    slot = after;
  }
  copies_arrive();
  const int64_t of_run = static_cast<int64_t>(part.run * f.n_experts + part.expert) * f.n_above;
  float* parts = f.of_weight + of_run * f.n_units + part.unit;
  const int column = 64 * group + 16 * (warp % 4) + thread % 32 / 4;  // of dz: this one, and eight further
#pragma unroll
  for (int i = 0; i < 128; i += 2) {
    const int m = column + i / 2 % 2 * 8, n = i / 64 * kDownHalf + i % 64 / 4 * 8 + 2 * (thread % 4);
    if (m < f.n_above && part.unit + n < f.n_units)
      *reinterpret_cast<float2*>(parts + static_cast<int64_t>(m) * f.n_units + n) =
          make_float2(dw[i / 64][i % 64], dw[i / 64][i % 64 + 1]);
  }
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

}  // namespace fastmtl::cuda
