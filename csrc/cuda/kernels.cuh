// embedding_bag's backward, and the tables' optimizers, as CUDA kernels.
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

namespace fastmtl::cuda {

constexpr int kThreads = 256;
constexpr int64_t kLong = 256;    // lookups from which a segment has a block of its own
constexpr int kTinyColumns = 64;  // columns of a tiny table that a block sums
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

// Finishes a row: `sum(column)` gives its gradient. `index` is its place where the gradients are listed.
template <int RULE, int VEC, class Sum>
__device__ __forceinline__ void finish(const Target& t, const Step& s, int64_t row, int64_t index, int lane, int lanes,
                                       const Sum& sum) {
  if constexpr (RULE != kNoRule) {
    if (*t.now < 0) return;  // vetoed: the same for all threads
  }
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
      const Floats<VEC> grad = sum(column);
      if constexpr (RULE == kNoRule) {
        store<VEC>(t.out + (t.rows ? index : row) * t.dim + column, grad);
      } else {
        Columns<RULE, VEC> columns(t, row * t.dim + column);
        columns.step(s, grad);
        columns.write(t, row * t.dim + column);
      }
    }
  }
  if (lane == 0) {
    if constexpr (RULE == kNoRule) {
      if (t.rows) t.rows[index] = row;
    } else {
      t.last[row] = *t.now;
    }
  }
}

template <int RULE>
__device__ __forceinline__ Step step_of(const Target& t) {
  if constexpr (RULE == kNoRule) {
    return Step{};
  } else {
    return *t.step;
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
  const Step step = step_of<RULE>(t);
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes; s < count;
       s += groups) {
    const int64_t begin = starts[s], end = s + 1 < count ? starts[s + 1] : in.n;
    const int64_t row = in.keys[begin];
    if (row >= in.void_row) continue;
    if (end - begin > kLong) {
      if (lane == 0) long_list[atomicAdd(n_long, 1)] = static_cast<int32_t>(s);
      continue;
    }
    finish<RULE, VEC>(t, step, row, s, lane, lanes, [&](int64_t column) { return walk<VEC>(in, begin, end, column); });
  }
}

// Shared memory: blockDim.x / lanes * dim floats.
template <int RULE, int VEC>
__global__ void long_segments_kernel(Lookups in, const int32_t* starts, const int32_t* n_starts, Target t, int lanes,
                                     const int32_t* long_list, const int32_t* n_long) {
  extern __shared__ float partial[];
  const int lane = static_cast<int>(threadIdx.x) % lanes, walker = static_cast<int>(threadIdx.x) / lanes;
  const int walkers = static_cast<int>(blockDim.x) / lanes;
  const Step step = step_of<RULE>(t);
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
      finish<RULE, VEC>(t, step, in.keys[begin], s, lane, lanes, [&](int64_t column) {
        Floats<VEC> total{};
        for (int w = 0; w < walkers; ++w) {
          for (int k = 0; k < VEC; ++k) total.v[k] = add(total.v[k], partial[w * t.dim + column + k]);
        }
        return total;
      });
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
// [n_runs, n_tiny_rows]. `copies` walkers, each with a sum of its own in shared memory: copies * vocab * (columns + 1)
// floats.
__global__ void tiny_tables_kernel(TinyTables tiny, Gradient grad, const float* counted, int32_t n_bags, bool mean,
                                   int64_t dim, int copies, int lanes, float* sums, int32_t* hits) {
  extern __shared__ float partial[];
  const int n_blocks = static_cast<int>((dim + kTinyColumns - 1) / kTinyColumns);
  const int64_t piece = blockIdx.x / n_blocks, run = piece / tiny.n_tables;
  const int32_t* table = tiny.tables + piece % tiny.n_tables * 4;
  const int first_column = static_cast<int>(blockIdx.x) % n_blocks * kTinyColumns;
  const int columns = dim - first_column < kTinyColumns ? static_cast<int>(dim) - first_column : kTinyColumns;
  const int vocab = table[0], size = vocab * columns;
  int32_t* seen = reinterpret_cast<int32_t*>(partial + static_cast<int64_t>(copies) * size);
  for (int i = threadIdx.x; i < copies * (size + vocab); i += blockDim.x) partial[i] = 0.0f;  // seen too: 0 is 0.0f
  __syncthreads();
  const int walker = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  if (walker < copies) {
    const int64_t begin = run * tiny.run_rows;
    const int64_t end = begin + tiny.run_rows < tiny.n_rows ? begin + tiny.run_rows : tiny.n_rows;
    const int64_t share = (tiny.run_rows + copies - 1) / copies, from = begin + walker * share;
    const int64_t to = from + share < end ? from + share : end;
    for (int64_t b = from; b < to; ++b) {
      for (int look = table[2]; look < table[3]; ++look) {
        const int32_t* where = tiny.lookups + 3 * look;
        const int32_t row = tiny.rows[b * tiny.n_columns + where[0]];
        if (row < 0 || row >= vocab) continue;
        const float divisor = mean ? counted[b * n_bags + where[2]] : 1.0f;
        for (int c = lane; c < columns; c += lanes) {
          float* to_sum = partial + walker * size + row * columns + c;
          *to_sum = add(*to_sum, divide(load<1>(grad, b * grad.stride + where[1] + first_column + c).v[0], divisor));
        }
        if (lane == 0) ++seen[walker * vocab + row];
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

// Adds the runs in their order, and finishes the rows: all of them where gradients are written, else those with a hit.
// Listed ones without a hit are void.
template <int RULE, int VEC>
__global__ void tiny_tables_sum_kernel(TinyTables tiny, const float* sums, const int32_t* hits, Target t,
                                       int64_t void_row, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / lanes);
  const Step step = step_of<RULE>(t);
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes; r < tiny.n_tiny_rows;
       r += groups) {
    int64_t seen = 0;
    for (int64_t run = 0; run < tiny.n_runs; ++run) seen += hits[run * tiny.n_tiny_rows + r];
    if (RULE != kNoRule && seen == 0) continue;
    finish<RULE, VEC>(t, step, tiny.places[r], r, lane, lanes, [&](int64_t column) {
      Floats<VEC> total{};
      for (int64_t run = 0; run < tiny.n_runs; ++run) {
        const Floats<VEC> part = load<VEC>(sums + (run * tiny.n_tiny_rows + r) * t.dim + column);
        for (int k = 0; k < VEC; ++k) total.v[k] = add(total.v[k], part.v[k]);
      }
      return total;
    });
    if (RULE == kNoRule && t.rows && seen == 0 && lane == 0) t.rows[r] = void_row;
  }
}

// ------------------------------------------------------------------------------------------------ missed steps

// Rows to be made current, and, where grads are given, to take the step `now` with them.
struct Work {
  const int64_t* rows;   // [n] unique but for void ones (outside 0 .. V - 1), or null
  const uint32_t* keys;  // [n] ascending, repeated ones passed by, or null; without either: start .. start + n - 1
  const float* grads;    // [n, dim], or null
  int64_t n, start, table_rows;
  const Step* steps;  // step s is steps[(s - first_step) % n_kept]
  int64_t first_step, n_kept, upto;
  const int32_t* clock;  // added to upto where given; without a list, which n rows are taken then goes by the step
  bool lazily;
  int32_t* behind;  // set to 1 where a row lags further than the kept steps reach; such a row is left alone
};

// The kept steps, one behind the other.
struct Ring {
  const Step* steps;
  int64_t n, at;
  __device__ __forceinline__ const Step& next() {
    const Step& found = steps[at];
    at = at + 1 < n ? at + 1 : 0;
    return found;
  }
};

template <int RULE, int VEC>
__global__ void table_rows_kernel(Target t, Work work, int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / lanes);
  const int64_t now = work.upto + (work.clock ? *work.clock : 0);
  const int64_t shares = work.n > 0 ? (work.table_rows + work.n - 1) / work.n : 1;
  const int64_t start = work.start + (work.clock && !work.rows && !work.keys ? now % shares * work.n : 0);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes; i < work.n;
       i += groups) {
    if (work.keys && i > 0 && work.keys[i - 1] == work.keys[i]) continue;
    const int64_t row = work.keys ? work.keys[i] : work.rows ? work.rows[i] : start + i;
    if (row < 0 || row >= work.table_rows) continue;
    const int64_t last = work.lazily ? now - 1 : t.last[row];
    __syncwarp(group_mask(lanes));  // all lanes have read `last` before one writes it
    if (!work.lazily && (last + 1 < work.first_step || now - last > work.n_kept)) {
      if (lane == 0) *work.behind = 1;
      continue;
    }
    if (!work.grads && last >= now) continue;
    // replayed up to there; one quotient for all the steps, which is dear at 64 bits
    const int64_t until = work.grads ? now - 1 : now, from = last < now ? last + 1 : now;
    const Ring ring{work.steps, work.n_kept, (from - work.first_step) % work.n_kept};
    if constexpr (RULE == kRowwiseAdagrad) {
      const int64_t column = static_cast<int64_t>(lane) * VEC;
      const bool inside = column < t.dim;
      Floats<VEC> p{}, grad{};
      if (inside) p = load<VEC>(t.p + row * t.dim + column);
      if (inside && work.grads) grad = load<VEC>(work.grads + i * t.dim + column);
      float first = t.first[row];
      Ring steps = ring;
      for (int64_t step = from; step <= until; ++step) {
        rowwise_step<VEC>(t, steps.next(), lane, lanes, Floats<VEC>{}, p, first);
      }
      if (work.grads) rowwise_step<VEC>(t, steps.next(), lane, lanes, grad, p, first);
      if (inside) store<VEC>(t.p + row * t.dim + column, p);
      __syncwarp(group_mask(lanes));  // all lanes have read `first` before one writes it
      if (lane == 0) t.first[row] = first;
    } else {
      for (int64_t column = static_cast<int64_t>(lane) * VEC; column < t.dim; column += lanes * VEC) {
        Columns<RULE, VEC> columns(t, row * t.dim + column);
        Ring steps = ring;
        for (int64_t step = from; step <= until; ++step) columns.step(steps.next(), Floats<VEC>{});
        if (work.grads) columns.step(steps.next(), load<VEC>(work.grads + i * t.dim + column));
        columns.write(t, row * t.dim + column);
      }
    }
    if (lane == 0) t.last[row] = static_cast<int32_t>(now);
  }
}

}  // namespace fastmtl::cuda
