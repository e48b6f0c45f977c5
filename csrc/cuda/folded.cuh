// A layer of experts and gates in evaluation with the towers behind it, as fastmtl/backends/triton/folded.py has it,
// for Hopper's tensor cores: a program goes through tiles of 128 rows, 64 for each of two warpgroups.
//
// A third warpgroup's first thread brings the weights, in stages of 16 KiB that lie in memory as products read them and
// in the order in which they are read (folded_stages.py): a ring of kStages holds what comes next. Both warpgroups read
// each stage. A warpgroup's rows of x stay in its half of the shared memory; the next tile's come while it mixes.
//
// What an expert leaves goes to memory that stays in the L2 cache, in the order of a thread's registers: a thread reads
// back what it wrote itself.
//
// Sums in fp32, operands bf16; deterministic, a row's result does not depend on its neighbours.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/activation.cuh"

namespace fastmtl::cuda {

constexpr int kWarpgroupRows = 64, kProgramRows = 128, kWarpgroup = 128, kFoldedThreads = 384;
constexpr int kStageBytes = 16384, kStages = 7;
constexpr int kMostInput = 384;  // columns of x
constexpr int kUnits1 = 256;     // of the first hidden layer
constexpr int kUnits2 = 128;     // of the last
constexpr int kGateColumns = 24, kSharePitch = 25;
constexpr int kTower1 = 64, kTower2 = 32;

struct Folded {
  const void* x;  // [n_rows, n_in] bf16, rows of row_bytes (a multiple of 16)
  int64_t row_bytes;
  int32_t n_rows, n_in;
  const unsigned char* stages;  // those of one tile
  const unsigned char* biases;  // [n_experts, 256 + 128] fp32
  int32_t n_experts, n_gates;
  const float* gate_bias;       // [24]
  const int32_t* gate_columns;  // [n_gates + 1]: where a gate's columns begin
  const int32_t* members;       // [n_experts, n_gates]: the column in which a gate weighs an expert, or -1
  uint4* left;                  // [programs, n_experts, 2, 8, 128]
  const float *tower_bias1, *tower_bias2, *head, *head_bias;  // [n_gates, 64], [n_gates, 32] twice, [n_gates]
  const bool* is_probability;                                 // [n_gates], or null for logits
  float* out;                                                 // [n_rows, n_gates]

  __host__ __device__ __forceinline__ int inputs() const { return (n_in + 31) / 32; }  // stages of a first layer
  __host__ __device__ __forceinline__ int of_expert() const { return inputs() + 4; }
  __host__ __device__ __forceinline__ int of_tile() const { return n_experts * of_expert() + 2 + 2 * n_gates; }
};

// Bytes of shared memory, and where things begin in it.
struct FoldedRoom {
  static constexpr int x = 0, of_warpgroup = kWarpgroupRows * kMostInput * 2;
  static constexpr int ring = x + 2 * of_warpgroup;
  static constexpr int biases = ring + kStages * kStageBytes, of_biases = 4 * (kUnits1 + kUnits2);
  static constexpr int shares = biases + 2 * of_biases, of_shares = 4 * kWarpgroupRows * kSharePitch;
  static constexpr int barriers = shares + 2 * of_shares;
  static constexpr int bytes = barriers + 16 * kStages;
};

// What a product leaves, with bias and activation, as the operand of the next: N sums of a thread, columns from that of
// bias[0] on.
template <int ACT, int N>
__device__ __forceinline__ void next_operand(const float* d, const float* bias, uint32_t (&a)[N / 2]) {
  const int first = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + first);
    a[2 * j] = activated_pair<ACT>(d[4 * j] + b.x, d[4 * j + 1] + b.y);
    a[2 * j + 1] = activated_pair<ACT>(d[4 * j + 2] + b.x, d[4 * j + 3] + b.y);
  }
}

// The ring of stages as who multiplies sees it.
struct Stages {
  uint32_t ring, full, empty;
  int next = 0, oldest = 0;
  uint32_t parity = 0;

  // The address of the next one, once it is there.
  __device__ __forceinline__ uint32_t take() {
    barrier_wait(full + 8 * next, parity);
    const uint32_t at = ring + next * kStageBytes;
    if (++next == kStages) next = 0, parity ^= 1;
    return at;
  }
  // This warp has read the oldest one that it took.
  __device__ __forceinline__ void release() {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * oldest);
    if (++oldest == kStages) oldest = 0;
  }
};

// Brings the stages of the program's tiles; runs in one thread.
__device__ __forceinline__ void bring_stages(const Folded& f, uint32_t room, int n_tiles) {
  const uint32_t full = room + FoldedRoom::barriers, empty = full + 8 * kStages;
  const int n_stages = f.of_tile(), per_expert = f.of_expert(), of_experts = f.n_experts * per_expert;
  constexpr uint32_t bias_bytes = FoldedRoom::of_biases;
  int slot = 0, expert = 0;
  uint32_t parity = 1;  // the first round finds every stage empty
  for (auto tile = static_cast<int>(blockIdx.x); tile < n_tiles; tile += static_cast<int>(gridDim.x)) {
    for (int i = 0, within = 0; i < n_stages; ++i) {
      barrier_wait(empty + 8 * slot, parity);
      const bool begins = i < of_experts && within == 0;
      const uint32_t barrier = full + 8 * slot, at = room + FoldedRoom::ring + slot * kStageBytes;
      const unsigned char* from = f.stages + static_cast<int64_t>(i) * kStageBytes;
      barrier_expect(barrier, kStageBytes + (begins ? bias_bytes : 0));
      copy_bulk(at, from, kStageBytes, barrier);
      if (begins) {
        copy_bulk(room + FoldedRoom::biases + (expert % 2) * FoldedRoom::of_biases,
                  f.biases + static_cast<int64_t>(i / per_expert) * bias_bytes, bias_bytes, barrier);
        ++expert;
      }
      if (++within == per_expert) within = 0;
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
  }
}

// Queues this warpgroup's rows of a tile, from `row` on, swizzled; columns and rows that are not there are zero.
__device__ __forceinline__ void bring_rows(const Folded& f, uint32_t to, int row) {
  const int thread = threadIdx.x % kWarpgroup, piece = thread % 8;
  const int blocks = (f.inputs() + 1) / 2;
  for (int block = 0; block < blocks; ++block) {
    const int k = 64 * block + 8 * piece;
    const int wanted = 2 * (f.n_in - k) < 16 ? 2 * (f.n_in - k) : 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 16 * i + thread / 8;
      const bool there = wanted > 0 && row + r < f.n_rows;
      const char* from =
          static_cast<const char*>(f.x) + (there ? static_cast<int64_t>(row + r) * f.row_bytes + 2 * k : 0);
      copy_16(to + block * 8192 + r * 128 + ((piece ^ (r % 8)) * 16), from, there ? wanted : 0);
    }
  }
}

// The gates' softmax in place: of logits [64, 25], a gate's columns side by side.
__device__ __forceinline__ void make_shares(const Folded& f, float* shares) {
  const int thread = threadIdx.x % kWarpgroup;
  float* row = shares + (thread % kWarpgroupRows) * kSharePitch;
  for (int g = thread / kWarpgroupRows; g < f.n_gates; g += 2) {
    const int begin = f.gate_columns[g], end = f.gate_columns[g + 1];
    float top = row[begin], sum = 0.0f;
    for (int c = begin + 1; c < end; ++c) top = row[c] > top ? row[c] : top;
    for (int c = begin; c < end; ++c) sum += row[c] = expf(row[c] - top);
    const float per_sum = __fdividef(1.0f, sum);
    for (int c = begin; c < end; ++c) row[c] *= per_sum;
  }
}

// y = the mixtures of gates `gate` and the one behind it, if it is there, of this thread's 2 x 32 elements.
__device__ __forceinline__ void mix(const Folded& f, int gate, const float* shares, const uint4* left,
                                    float (&y)[2][64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) y[0][i] = y[1][i] = 0.0f;
  uint4 now[8], coming[8];
#pragma unroll
  for (int q = 0; q < 8; ++q) now[q] = load_from_l2(left + q * kWarpgroup);
#pragma unroll 1
  for (int e = 0; e < f.n_experts; ++e) {
    if (e + 1 < f.n_experts) {
      left += 2 * 8 * kWarpgroup;
#pragma unroll
      for (int q = 0; q < 8; ++q) coming[q] = load_from_l2(left + q * kWarpgroup);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int column = gate + k < f.n_gates ? f.members[e * f.n_gates + gate + k] : -1;
      if (column < 0) continue;  // an expert that it does not mix may be NaN
      const float upper_row = shares[column], lower_row = shares[8 * kSharePitch + column];
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const uint32_t pairs[4] = {now[q].x, now[q].y, now[q].z, now[q].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float share = i % 2 == 0 ? upper_row : lower_row;
          y[k][8 * q + 2 * i] += share * lower(pairs[i]);
          y[k][8 * q + 2 * i + 1] += share * upper(pairs[i]);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) now[q] = coming[q];
  }
}

// A tower on a mixture: its two layers, output and sigmoid.
template <int ACT>
__device__ __forceinline__ void predict(const Folded& f, int gate, const float (&y)[64], Stages& ring, int row) {
  uint32_t a[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) a[i] = packed(y[2 * i], y[2 * i + 1]);
  float t1[32];
  uint32_t at = ring.take();
  held(a), products_begin();
  multiply<true>(t1, a, descriptor(at, 128, 1024));
#pragma unroll
  for (int s = 1; s < 8; ++s) multiply<false>(t1, a + 4 * s, descriptor(at + s / 4 * 8192 + s % 4 * 32, 128, 1024));
  products_commit(), products_wait<0>(), held(t1), held(a);
  ring.release();
  uint32_t a2[16];
  next_operand<ACT, 32>(t1, f.tower_bias1 + gate * kTower1, a2);
  float t2[16];
  at = ring.take();
  held(a2), products_begin();
  multiply<true>(t2, a2, descriptor(at, 128, 1024));
#pragma unroll
  for (int s = 1; s < 4; ++s) multiply<false>(t2, a2 + 4 * s, descriptor(at + s * 32, 128, 1024));
  products_commit(), products_wait<0>(), held(t2), held(a2);
  ring.release();
  float z[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int n = gate * kTower2 + i / 4 * 8 + 2 * (threadIdx.x % 4) + i % 2;
    z[i % 4 / 2] += f.head[n] * activated<ACT>(t2[i] + f.tower_bias2[n]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    z[i] += __shfl_xor_sync(0xFFFFFFFFu, z[i], 1);
    z[i] += __shfl_xor_sync(0xFFFFFFFFu, z[i], 2);
    z[i] += f.head_bias[gate];
    if (f.is_probability && f.is_probability[gate]) z[i] = __fdividef(1.0f, 1.0f + expf(-z[i]));
    const int r = row + 8 * i;
    if (threadIdx.x % 4 == 0 && r < f.n_rows) f.out[static_cast<int64_t>(r) * f.n_gates + gate] = z[i];
  }
}

// One of the two warpgroups that multiply; of n_tiles, those that are the program's.
template <int ACT>
__device__ __forceinline__ void multiply_tiles(const Folded& f, unsigned char* memory, uint32_t room, int n_tiles) {
  const int mine = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int in_tile = kWarpgroupRows * mine + 16 * (thread / 32) + lane / 4;  // this thread's rows: and eight further
  const uint32_t x = room + FoldedRoom::x + mine * FoldedRoom::of_warpgroup;
  float* shares = reinterpret_cast<float*>(memory + FoldedRoom::shares + mine * FoldedRoom::of_shares);
  const float* my_shares = shares + (in_tile - kWarpgroupRows * mine) * kSharePitch;
  const uint32_t left = (blockIdx.x * f.n_experts * 2 + mine) * 8 * kWarpgroup + thread;  // where f.left begins for it
  const uint32_t barriers = room + FoldedRoom::barriers;
  Stages ring{room + FoldedRoom::ring, barriers, barriers + 8 * kStages};
  const int inputs = f.inputs(), n_experts = f.n_experts;
  uint32_t expert = 0;  // counts on over the tiles
  const auto biases_of = [&](uint32_t number) {
    return reinterpret_cast<const float*>(memory + FoldedRoom::biases + (number % 2) * FoldedRoom::of_biases);
  };

  float last[64];
  const auto leave = [&](int e) {
    const float* bias = biases_of(expert) + kUnits1;
    uint4* to = f.left + (left + e * 2 * 8 * kWarpgroup);
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      uint32_t h[4];
      next_operand<ACT, 8>(last + 8 * q, bias + 16 * q, h);
      store_to_l2(to + q * kWarpgroup, make_uint4(h[0], h[1], h[2], h[3]));
    }
  };

  const auto step = static_cast<int>(gridDim.x);
  bring_rows(f, x, kProgramRows * static_cast<int>(blockIdx.x) + kWarpgroupRows * mine);
  for (auto tile = static_cast<int>(blockIdx.x); tile < n_tiles; tile += step) {
    copies_arrive();
    threads_meet(1 + mine, kWarpgroup);
    for (int e = 0; e < n_experts; ++e) {
      float first[128];
      uint32_t at = ring.take();
      products_begin();
      multiply<true>(first, descriptor(x, 128, 1024), descriptor(at, 64, 512));
      multiply<false>(first, descriptor(x + 32, 128, 1024), descriptor(at + 32, 64, 512));
      products_commit();
#pragma unroll 1
      for (int s = 1; s < inputs; ++s) {
        const uint32_t columns = x + s / 2 * 8192 + s % 2 * 64;
        at = ring.take();
        products_begin();
        multiply<false>(first, descriptor(columns, 128, 1024), descriptor(at, 64, 512));
        multiply<false>(first, descriptor(columns + 32, 128, 1024), descriptor(at + 32, 64, 512));
        products_commit();
        products_wait<1>();
        ring.release();
      }
      products_wait<0>();
      held(first);
      ring.release();
      uint32_t operands[2][16];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t (&a)[16] = operands[s % 2];
        next_operand<ACT, 32>(first + 32 * s, biases_of(expert) + 64 * s, a);
        at = ring.take();
        held(a), products_begin();
        if (s == 0) {
          multiply<true>(last, a, descriptor(at, 128, 1024));
        } else {
          multiply<false>(last, a, descriptor(at, 128, 1024));
        }
#pragma unroll
        for (int k = 1; k < 4; ++k) multiply<false>(last, a + 4 * k, descriptor(at + 32 * k, 128, 1024));
        products_commit();
        if (s > 0) {
          products_wait<1>();
          ring.release();
        }
      }
      products_wait<0>();
      held(last);
      ring.release();
      leave(e);
      ++expert;
    }
    float logits[12];
    uint32_t at = ring.take();
    products_begin();
    multiply<true>(logits, descriptor(x, 128, 1024), descriptor(at, 128, 1024));
#pragma unroll
    for (int k = 1; k < 4; ++k)
      multiply<false>(logits, descriptor(x + 32 * k, 128, 1024), descriptor(at + 32 * k, 128, 1024));
    products_commit();
    const uint32_t behind = ring.take();
#pragma unroll 1
    for (int block = 1; block < (inputs + 1) / 2; ++block) {
      products_begin();
      const uint32_t weights = (block < 3 ? at : behind) + block % 3 * 3072;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply<false>(logits, descriptor(x + block * 8192 + 32 * k, 128, 1024),
                        descriptor(weights + 32 * k, 128, 1024));
      }
      products_commit();
    }
    products_wait<0>();
    held(logits);
    ring.release();
    ring.release();
#pragma unroll
    for (int i = 0; i < 12; ++i) {
      const int c = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      shares[(in_tile - kWarpgroupRows * mine + i % 4 / 2 * 8) * kSharePitch + c] = logits[i] + f.gate_bias[c];
    }
    threads_meet(1 + mine, kWarpgroup);  // nobody reads x any more, either
    if (tile + step < n_tiles) bring_rows(f, x, kProgramRows * (tile + step) + kWarpgroupRows * mine);
    make_shares(f, shares);
    threads_meet(1 + mine, kWarpgroup);
    for (int gate = 0; gate < f.n_gates; gate += 2) {
      float y[2][64];
      mix(f, gate, my_shares, f.left + left, y);
      predict<ACT>(f, gate, y[0], ring, kProgramRows * tile + in_tile);
      if (gate + 1 < f.n_gates) predict<ACT>(f, gate + 1, y[1], ring, kProgramRows * tile + in_tile);
    }
  }
}

// A program takes each gridDim-th of n_tiles.
template <int ACT>
__global__ void __launch_bounds__(kFoldedThreads, 1) folded_kernel(const __grid_constant__ Folded f, int32_t n_tiles) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* memory = program_memory();
  const uint32_t room = shared_address(memory), barriers = room + FoldedRoom::barriers;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(barriers + 8 * i, 1);
      barrier_init(barriers + 8 * (kStages + i), 8);
    }
    barriers_made();
  }
  __syncthreads();
  if (threadIdx.x >= 2 * kWarpgroup) {
    fewer_registers<24>();
    if (threadIdx.x == 2 * kWarpgroup) bring_stages(f, room, n_tiles);
  } else {
    more_registers<240>();
    multiply_tiles<ACT>(f, memory, room, n_tiles);
  }
#else
  __trap();  // compiled for another device, where nobody starts it
#endif
}

}  // namespace fastmtl::cuda
