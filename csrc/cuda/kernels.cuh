// embedding_bag's backward as CUDA kernels, and the optimizer's step of a row whose gradient is there.
//
// Grid        one-dimensional, any size: every kernel strides over its work, whose amount it reads on the device.
// Layout      a row of a table is owned by `lanes` neighbouring threads (a power of two up to 32) with VEC columns
//             each: at D = 16 four lanes of 16 bytes, so that a warp has eight rows in flight.
// Accumulation fp32. Segments of up to kLong lookups are added in the order of the batch, as the native backend adds;
//             longer ones, and tiny tables, in shares of the batch that are added in their order.
// Determinism the same call gives the same bits: nothing is added atomically. (The list of long segments comes in any
//             order; each of its entries is a row of its own.)
// Bounds      rows come from row_of, places from the sort, so that nothing is read or written outside the arrays.
// Aliasing    outputs must not overlap inputs.
#pragma once

#include <cstdint>

#include "cuda/lookups.h"
#include "cuda/quick_adam.h"

namespace fastmtl::cuda {

constexpr int kThreads = 256;
constexpr int64_t kLong = 256;    // lookups from which a segment has a block of its own
constexpr int kTinyColumns = 64;  // columns of a tiny table that a block sums
constexpr int kTinyUnrolled = 8;  // its loads in flight a lane
constexpr int kUnrolled = 4;      // loads in flight a lane

template <int VEC>
struct alignas(VEC * 4) Floats {
  float v[VEC];
};

template <int VEC>
__device__ __forceinline__ Floats<VEC> load(const float* from) {
  return *reinterpret_cast<const Floats<VEC>*>(from);
}
template <int VEC>
__device__ __forceinline__ Floats<VEC> load(const Gradient& grad, int64_t at) {
  if (!grad.half) return load<VEC>(static_cast<const float*>(grad.data) + at);
  struct alignas(VEC * 2) Halves {
    uint16_t v[VEC];
  };
  const Halves found = *reinterpret_cast<const Halves*>(static_cast<const uint16_t*>(grad.data) + at);
  Floats<VEC> wide;
  for (int k = 0; k < VEC; ++k) wide.v[k] = widen(found.v[k]);
  return wide;
}
template <int VEC>
__device__ __forceinline__ void store(float* to, const Floats<VEC>& value) {
  *reinterpret_cast<Floats<VEC>*>(to) = value;
}

// The threads of this thread's group of `lanes`, as a mask of its warp.
__device__ __forceinline__ unsigned group_mask(int lanes) {
  const unsigned ones = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1u;
  return ones << (threadIdx.x % 32 / lanes * lanes);
}

__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(group_mask(lanes), x, offset);
  return x;
}

// --------------------------------------------------------------------------------------------------- ids to rows

// Writes keys and order [B, n_sorted], tiny [B, n_tiny], counted [B, n_bags].
__global__ void linearise_kernel(IdView ids, const BagPlan* bags, int64_t n_rows, int64_t n_bags, int64_t n_sorted,
                                 int64_t n_tiny, uint32_t void_row, uint32_t* keys, int32_t* order, int32_t* tiny,
                                 float* counted) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_rows * n_bags; i += threads) {
    const int64_t b = i / n_bags, f = i % n_bags;
    const BagPlan bag = bags[f];
    int64_t live = 0;
    for (int64_t k = 0; k < bag.length; ++k) {
      const int64_t row = row_of(bag, ids(b, bag.first + k));
      live += row >= 0;
      if (bag.tiny) {
        tiny[b * n_tiny + bag.column + k] = static_cast<int32_t>(row);
      } else {
        const int64_t at = b * n_sorted + bag.column + k;
        keys[at] = row >= 0 ? static_cast<uint32_t>(bag.offset + row) : void_row;
        order[at] = static_cast<int32_t>(at);
      }
    }
    counted[i] = bag.mean && live > 1 ? static_cast<float>(live) : 1.0f;
  }
}

// ------------------------------------------------------------------------------------------- a row and its gradient

// Where the gradient of a lookup lies: row of the batch, output column, bag.
struct Where {
  int32_t b, column, bag;
};

// Adds the lookups [begin, end) of one row, columns column .. column + VEC - 1, in their order.
template <int VEC>
__device__ __forceinline__ Floats<VEC> walk(const Lookups& in, int64_t begin, int64_t end, int64_t column) {
  Floats<VEC> total{};
  for (int64_t i = begin; i < end; i += kUnrolled) {
    // stage by stage: a load that waits for another would otherwise keep the next lookup's from starting
    int32_t place[kUnrolled];
    Where where[kUnrolled];
    Floats<VEC> found[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) place[u] = i + u < end ? in.order[i + u] : 0;
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      where[u].b = place[u] / in.n_columns;
      const int32_t* entry = in.columns + 2 * (place[u] - where[u].b * in.n_columns);
      where[u].column = entry[0];
      where[u].bag = entry[1];
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      found[u] = Floats<VEC>{};
      if (i + u < end) found[u] = load<VEC>(in.grad, where[u].b * in.grad.stride + where[u].column + column);
    }
    if (in.mean) {
#pragma unroll
      for (int u = 0; u < kUnrolled; ++u) {
        const float divisor = in.counted[static_cast<int64_t>(where[u].b) * in.n_bags + where[u].bag];
        for (int k = 0; k < VEC; ++k) found[u].v[k] = divide(found[u].v[k], divisor);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      if (i + u < end) {
        for (int k = 0; k < VEC; ++k) total.v[k] = add(total.v[k], found[u].v[k]);
      }
    }
  }
  return total;
}

// The state of VEC columns of a row, where the rule has it.
template <int RULE, int VEC>
struct Columns {
  Floats<VEC> p, first{}, second{};

  __device__ __forceinline__ Columns(const Target& t, int64_t at) : p(load<VEC>(t.p + at)) {
    if constexpr (kHasFirst<RULE> && RULE != kRowwiseAdagrad) first = load<VEC>(t.first + at);
    if constexpr (kHasSecond<RULE>) second = load<VEC>(t.second + at);
  }
  __device__ __forceinline__ void step(const Step& s, const Floats<VEC>& grad) {
    for (int k = 0; k < VEC; ++k) {
      move<RULE>(s, with_decay(s, grad.v[k], p.v[k]), p.v[k], first.v[k], second.v[k]);
    }
  }
  // The steps[missed - 1] to steps[0] with gradients of zero, then, where it is given, `last` with `grad`. False: the
  // columns are not what `step` makes of them, and have to be loaded again.
  __device__ __forceinline__ bool quick_steps(const QuickStep* steps, int missed, const QuickStep* last,
                                              const Floats<VEC>& grad) {
    float far[VEC];
#pragma unroll
    for (int k = 0; k < VEC; ++k) far[k] = far_second(second.v[k]);
    for (int j = missed - 1; j >= 0; --j) {
      const QuickStep s = steps[j];
#pragma unroll
      for (int k = 0; k < VEC; ++k) quick_move<RULE == kAdamW>(s, 0.0f, p.v[k], first.v[k], far[k]);
    }
    if (last) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) quick_move<RULE == kAdamW>(*last, grad.v[k], p.v[k], first.v[k], far[k]);
    }
    bool is_finite = true;
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      second.v[k] = mul(far[k], kNear);
      is_finite = is_finite && fabsf(p.v[k]) <= FLT_MAX;
    }
    return is_finite;
  }
  __device__ __forceinline__ void write(const Target& t, int64_t at) const {
    store<VEC>(t.p + at, p);
    if constexpr (kHasFirst<RULE> && RULE != kRowwiseAdagrad) store<VEC>(t.first + at, first);
    if constexpr (kHasSecond<RULE>) store<VEC>(t.second + at, second);
  }
};

// Takes the row-wise step of a row whose group calls together, one lane for each VEC columns (dim <= lanes * VEC).
template <int VEC>
__device__ __forceinline__ void rowwise_step(const Target& t, const Step& s, int lane, int lanes,
                                             const Floats<VEC>& grad, Floats<VEC>& p, float& first) {
  float squares = 0.0f;
  Floats<VEC> g{};
  if (static_cast<int64_t>(lane) * VEC < t.dim) {
    for (int k = 0; k < VEC; ++k) {
      g.v[k] = with_decay(s, grad.v[k], p.v[k]);
      squares = add(squares, mul(g.v[k], g.v[k]));
    }
  }
  first = add(first, divide(group_sum(squares, lanes), static_cast<float>(t.dim)));
  for (int k = 0; k < VEC; ++k) move_rowwise(s, g.v[k], p.v[k], first);
}

// The step that the rows of a launch take.
template <int RULE>
struct Taken {
  Step step{};
  QuickStep quick{};
  int32_t now = 0;  // negative: vetoed, no row is moved

  __device__ explicit Taken(const Target& t) {
    if constexpr (RULE != kNoRule) {
      step = *t.step;
      now = *t.now;
      if constexpr (kIsQuick<RULE>) quick = quick_step(step);
    }
  }
};

// Finishes a row: `sum(column)` gives its gradient. `index` is its place where the gradients are listed.
template <int RULE, int VEC, class Sum>
__device__ __forceinline__ void finish(const Target& t, const Taken<RULE>& taken, int64_t row, int64_t index, int lane,
                                       int lanes, const Sum& sum) {
  const Step& s = taken.step;
  if constexpr (RULE == kRowwiseAdagrad) {
    const int64_t column = static_cast<int64_t>(lane) * VEC, at = row * t.dim + column;
    const bool inside = column < t.dim;
    Floats<VEC> p{}, grad{};
    if (inside) {
      p = load<VEC>(t.p + at);
      grad = sum(column);
    }
    float first = t.first[row];
    rowwise_step<VEC>(t, s, lane, lanes, grad, p, first);
    if (inside) store<VEC>(t.p + at, p);
    __syncwarp(group_mask(lanes));  // all lanes have read `first` before one writes it
    if (lane == 0) t.first[row] = first;
  } else {
    for (int64_t column = static_cast<int64_t>(lane) * VEC; column < t.dim; column += lanes * VEC) {
      if constexpr (RULE == kNoRule) {
        store<VEC>(t.out + (t.rows ? index : row) * t.dim + column, sum(column));
      } else {
        const int64_t at = row * t.dim + column;
        Columns<RULE, VEC> columns(t, at);  // on its way while the gradient is summed
        const Floats<VEC> grad = sum(column);
        bool is_done = false;
        if constexpr (kIsQuick<RULE>) is_done = columns.quick_steps(nullptr, 0, &taken.quick, grad);
        if (!is_done) {
          if constexpr (kIsQuick<RULE>) columns = Columns<RULE, VEC>(t, at);
          columns.step(s, grad);
        }
        columns.write(t, at);
      }
    }
  }
  if (lane == 0) {
    if constexpr (RULE == kNoRule) {
      if (t.rows) t.rows[index] = row;
    } else {
      t.last[row] = taken.now;
    }
  }
}

// ------------------------------------------------------------------------------------------------ sorted lookups

// Segment s is the lookups [starts[s], starts[s + 1]) of one row; the last one ends at n. Those of more than kLong
// lookups are left in long_list [n], their number in n_long (0 before).
template <int RULE, int VEC>
__global__ void short_segments_kernel(Lookups in, const int32_t* starts, const int32_t* n_starts, Target t, int lanes,
                                      int32_t* long_list, int32_t* n_long) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / lanes), count = *n_starts;
  const Taken<RULE> taken(t);
  if (taken.now < 0) return;  // the same for all threads
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes; s < count;
       s += groups) {
    const int64_t begin = starts[s], end = s + 1 < count ? starts[s + 1] : in.n;
    const int64_t row = in.keys[begin];
    if (row >= in.void_row) continue;
    if (end - begin > kLong) {
      if (lane == 0) long_list[atomicAdd(n_long, 1)] = static_cast<int32_t>(s);
      continue;
    }
    finish<RULE, VEC>(t, taken, row, s, lane, lanes, [&](int64_t column) { return walk<VEC>(in, begin, end, column); });
  }
}

// What the walkers of a block left in `partial`, in their order.
template <int VEC>
__device__ __forceinline__ Floats<VEC> sum_of_walkers(const float* partial, int walkers, int64_t dim, int64_t column) {
  Floats<VEC> total{};
  for (int w = 0; w < walkers; ++w) {
    for (int k = 0; k < VEC; ++k) total.v[k] = add(total.v[k], partial[w * dim + column + k]);
  }
  return total;
}

// Shared memory: blockDim.x / lanes * dim floats.
template <int RULE, int VEC>
__global__ void long_segments_kernel(Lookups in, const int32_t* starts, const int32_t* n_starts, Target t, int lanes,
                                     const int32_t* long_list, const int32_t* n_long) {
  extern __shared__ __align__(16) float partial[];
  const int lane = static_cast<int>(threadIdx.x) % lanes, walker = static_cast<int>(threadIdx.x) / lanes;
  const int walkers = static_cast<int>(blockDim.x) / lanes;
  const Taken<RULE> taken(t);
  if (taken.now < 0) return;  // the same for all threads
  for (int64_t i = blockIdx.x; i < *n_long; i += gridDim.x) {
    const int64_t s = long_list[i], begin = starts[s], end = s + 1 < *n_starts ? starts[s + 1] : in.n;
    const int64_t share = (end - begin + walkers - 1) / walkers, from = begin + walker * share;
    const int64_t to = from + share < end ? from + share : end;
    for (int64_t column = static_cast<int64_t>(lane) * VEC; column < t.dim; column += lanes * VEC) {
      const Floats<VEC> sum = walk<VEC>(in, from, to, column);
      for (int k = 0; k < VEC; ++k) partial[walker * t.dim + column + k] = sum.v[k];
    }
    __syncthreads();
    if (walker == 0) {
      finish<RULE, VEC>(t, taken, in.keys[begin], s, lane, lanes,
                        [&](int64_t column) { return sum_of_walkers<VEC>(partial, walkers, t.dim, column); });
    }
    __syncthreads();
  }
}

// --------------------------------------------------------------------------------------------------- tiny tables

// The tiny tables of a weight, as embedding_plan.py lays them out.
struct TinyTables {
  const int32_t* rows;     // [B, n_columns] row in the table, or -1
  const int32_t* tables;   // [n_tables, 4] vocabulary, first tiny row, first and last + 1 lookup
  const int32_t* lookups;  // [m, 3] column of rows, output column, bag
  const int64_t* places;   // [n_tiny_rows] the weight's row of each tiny row
  int64_t n_rows, run_rows;
  int32_t n_tables, n_columns, n_tiny_rows, n_runs;
};

// One block a run of run_rows of the batch, a table and kTinyColumns columns: sums [n_runs, n_tiny_rows, dim], hits
// [n_runs, n_tiny_rows]. As many walkers as have room for a sum of their own in `room` floats of shared memory.
__global__ void tiny_tables_kernel(TinyTables tiny, Gradient grad, const float* counted, int32_t n_bags, bool mean,
                                   int64_t dim, int room, int lanes, float* sums, int32_t* hits) {
  extern __shared__ __align__(16) float partial[];
  const int n_blocks = static_cast<int>((dim + kTinyColumns - 1) / kTinyColumns);
  const int64_t piece = blockIdx.x / n_blocks, run = piece / tiny.n_tables;
  const int32_t* table = tiny.tables + piece % tiny.n_tables * 4;
  const int first_column = static_cast<int>(blockIdx.x) % n_blocks * kTinyColumns;
  const int columns = dim - first_column < kTinyColumns ? static_cast<int>(dim) - first_column : kTinyColumns;
  const int vocab = table[0], size = vocab * columns;
  const int most = static_cast<int>(blockDim.x) / lanes, fitting = room / (vocab * (columns + 1));
  const int copies = fitting < 1 ? 1 : fitting < most ? fitting : most;
  int32_t* seen = reinterpret_cast<int32_t*>(partial + static_cast<int64_t>(copies) * size);
  for (int i = threadIdx.x; i < copies * (size + vocab); i += blockDim.x) partial[i] = 0.0f;  // seen too: 0 is 0.0f
  __syncthreads();
  const int walker = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  if (walker < copies) {
    const int64_t begin = run * tiny.run_rows;
    const int64_t end = begin + tiny.run_rows < tiny.n_rows ? begin + tiny.run_rows : tiny.n_rows;
    const int64_t share = (tiny.run_rows + copies - 1) / copies, from = begin + walker * share;
    const int64_t to = from + share < end ? from + share : end;
    for (int look = table[2]; look < table[3]; ++look) {
      const int32_t* where = tiny.lookups + 3 * look;
      for (int64_t b = from; b < to; b += kTinyUnrolled) {
        // stage by stage, as in `walk`
        int32_t row[kTinyUnrolled];
#pragma unroll
        for (int u = 0; u < kTinyUnrolled; ++u) {
          row[u] = b + u < to ? tiny.rows[(b + u) * tiny.n_columns + where[0]] : -1;
          if (row[u] >= vocab) row[u] = -1;
        }
        for (int c = lane; c < columns; c += lanes) {
          float found[kTinyUnrolled];
#pragma unroll
          for (int u = 0; u < kTinyUnrolled; ++u) {
            found[u] = 0.0f;
            if (b + u < to) found[u] = load<1>(grad, (b + u) * grad.stride + where[1] + first_column + c).v[0];
          }
          if (mean) {
#pragma unroll
            for (int u = 0; u < kTinyUnrolled; ++u) {
              if (b + u < to) found[u] = divide(found[u], counted[(b + u) * n_bags + where[2]]);
            }
          }
#pragma unroll
          for (int u = 0; u < kTinyUnrolled; ++u) {
            if (row[u] < 0) continue;
            float* to_sum = partial + walker * size + row[u] * columns + c;
            *to_sum = add(*to_sum, found[u]);
          }
        }
#pragma unroll
        for (int u = 0; u < kTinyUnrolled; ++u) {
          if (lane == 0 && row[u] >= 0) ++seen[walker * vocab + row[u]];
        }
      }
    }
  }
  __syncthreads();
  const int64_t out = run * tiny.n_tiny_rows + table[1];
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float total = 0.0f;
    for (int w = 0; w < copies; ++w) total = add(total, partial[w * size + i]);
    sums[(out + i / columns) * dim + first_column + i % columns] = total;
  }
  for (int i = threadIdx.x; i < vocab && first_column == 0; i += blockDim.x) {
    int32_t total = 0;
    for (int w = 0; w < copies; ++w) total += seen[w * vocab + i];
    hits[out + i] = total;
  }
}

// A block adds the runs of a row in their order, shares of them side by side, and finishes it: every row where
// gradients are written, else those with a hit. Listed ones without a hit are void. Shared memory: tiny_sum_bytes.
inline int64_t tiny_sum_bytes(int lanes, int64_t dim) { return kThreads / lanes * (dim + 1) * 4; }
template <int RULE, int VEC>
__global__ void tiny_tables_sum_kernel(TinyTables tiny, const float* sums, const int32_t* hits, Target t,
                                       int64_t void_row, int lanes) {
  extern __shared__ __align__(16) float partial[];
  const int lane = static_cast<int>(threadIdx.x) % lanes, walker = static_cast<int>(threadIdx.x) / lanes;
  const int walkers = static_cast<int>(blockDim.x) / lanes;
  int32_t* seen_by = reinterpret_cast<int32_t*>(partial + walkers * t.dim);
  const Taken<RULE> taken(t);
  if (taken.now < 0) return;  // the same for all threads
  const int64_t share = (tiny.n_runs + walkers - 1) / walkers, from = walker * share;
  const int64_t to = from + share < tiny.n_runs ? from + share : tiny.n_runs;
  for (int64_t r = blockIdx.x; r < tiny.n_tiny_rows; r += gridDim.x) {
    int32_t mine = 0;
    for (int64_t run = from; run < to; ++run) mine += hits[run * tiny.n_tiny_rows + r];
    if (lane == 0) seen_by[walker] = mine;
    for (int64_t column = static_cast<int64_t>(lane) * VEC; column < t.dim; column += lanes * VEC) {
      Floats<VEC> total{};
      for (int64_t run = from; run < to; ++run) {
        const Floats<VEC> part = load<VEC>(sums + (run * tiny.n_tiny_rows + r) * t.dim + column);
        for (int k = 0; k < VEC; ++k) total.v[k] = add(total.v[k], part.v[k]);
      }
      for (int k = 0; k < VEC; ++k) partial[walker * t.dim + column + k] = total.v[k];
    }
    __syncthreads();
    if (walker == 0) {
      int64_t seen = 0;
      for (int w = 0; w < walkers; ++w) seen += seen_by[w];
      if (RULE == kNoRule || seen > 0) {
        finish<RULE, VEC>(t, taken, tiny.places[r], r, lane, lanes,
                          [&](int64_t column) { return sum_of_walkers<VEC>(partial, walkers, t.dim, column); });
      }
      if (RULE == kNoRule && t.rows && seen == 0 && lane == 0) t.rows[r] = void_row;
    }
    __syncthreads();
  }
}

}  // namespace fastmtl::cuda
