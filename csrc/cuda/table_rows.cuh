// Rows of a table that make up for the steps they missed, and take one: a CUDA kernel, in the terms of kernels.cuh.
#pragma once

#include "cuda/kernels.cuh"

namespace fastmtl::cuda {

constexpr int kGathered = 512;  // rows at most that a block looks at before it moves those that missed steps

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

// Rows that a block has found, in the order in which they are moved: those that missed the most steps first, so that
// the rows of a warp, which wait for each other, missed about as many.
struct Gathered {
  QuickStep*
      steps;  // [kQuickSteps] backwards from the last one that is replayed; written where a rule has a quick form
  int64_t* row;
  int32_t* missed;  // steps to be replayed
  int32_t* place;   // in the list of rows
  int32_t* counts;  // [kBins] of rows, by the steps they missed
  int32_t* begins;  // [kBins]
  static constexpr int kBins = kQuickSteps + 1;

  FASTMTL_BOTH static int64_t bytes(int gathered) {
    return static_cast<int64_t>(sizeof(QuickStep)) * (kQuickSteps + 1) + gathered * 16 + 2 * kBins * 4;
  }
  __device__ Gathered(float* shared, int gathered)
      : steps(reinterpret_cast<QuickStep*>(shared)),
        row(reinterpret_cast<int64_t*>(steps + kQuickSteps + 1)),
        missed(reinterpret_cast<int32_t*>(row + gathered)),
        place(missed + gathered),
        counts(place + gathered),
        begins(counts + kBins) {}
};

// The steps that a row missed, as `rows[i]` of the work: -1 where there is none to be moved.
__device__ __forceinline__ int64_t row_to_move(const Target& t, const Work& work, int64_t i, int64_t start, int64_t now,
                                               int32_t& missed) {
  if (work.keys && i > 0 && work.keys[i - 1] == work.keys[i]) return -1;
  const int64_t row = work.keys ? work.keys[i] : work.rows ? work.rows[i] : start + i;
  if (row < 0 || row >= work.table_rows) return -1;
  const int64_t last = work.lazily ? now - 1 : t.last[row];
  if (!work.lazily && (last + 1 < work.first_step || now - last > work.n_kept)) {
    *work.behind = 1;
    return -1;
  }
  if (!work.grads && last >= now) return -1;
  const int64_t until = work.grads ? now - 1 : now;
  missed = last < until ? static_cast<int32_t>(until - last) : 0;
  t.last[row] = static_cast<int32_t>(now);
  return row;
}

// Shared memory: Gathered::bytes(gathered). A block gathers rows, and moves them when it has found them all.
template <int RULE, int VEC>
__global__ void __launch_bounds__(kThreads, 3) table_rows_kernel(Target t, Work work, int lanes, int gathered) {
  extern __shared__ __align__(16) float partial[];
  const Gathered found(partial, gathered);
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const int64_t now = work.upto + (work.clock ? *work.clock : 0);
  const int64_t shares = work.n > 0 ? (work.table_rows + work.n - 1) / work.n : 1;
  const int64_t start = work.start + (work.clock && !work.rows && !work.keys ? now % shares * work.n : 0);
  const int64_t until = work.grads ? now - 1 : now;  // replayed up to there
  if constexpr (kIsQuick<RULE>) {
    for (int j = threadIdx.x; j < kQuickSteps; j += blockDim.x) {
      const int64_t step = until - j - work.first_step;
      if (step >= 0 && j < work.n_kept) found.steps[j] = quick_step(work.steps[step % work.n_kept]);
    }
    if (work.grads && threadIdx.x == 0) {
      found.steps[kQuickSteps] = quick_step(work.steps[(now - work.first_step) % work.n_kept]);
    }
  }
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * gathered; base < work.n;
       base += static_cast<int64_t>(gridDim.x) * gathered) {
    for (int j = threadIdx.x; j < Gathered::kBins; j += blockDim.x) found.counts[j] = 0;
    __syncthreads();
    constexpr int kMine = kGathered / kThreads;
    int64_t row[kMine];
    int32_t missed[kMine], rank[kMine];
#pragma unroll
    for (int c = 0; c < kMine; ++c) {
      const int at = c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      row[c] = at < gathered && base + at < work.n ? row_to_move(t, work, base + at, start, now, missed[c]) : -1;
      if (row[c] >= 0) rank[c] = atomicAdd(found.counts + (missed[c] < kQuickSteps ? missed[c] : kQuickSteps), 1);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < Gathered::kBins; j += blockDim.x) {
      int32_t before = 0;
      for (int k = 0; k < Gathered::kBins; ++k) before += k > j ? found.counts[k] : 0;
      found.begins[j] = before;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kMine; ++c) {
      if (row[c] < 0) continue;
      const int slot = found.begins[missed[c] < kQuickSteps ? missed[c] : kQuickSteps] + rank[c];
      found.row[slot] = row[c];
      found.missed[slot] = missed[c];
      found.place[slot] = c * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    }
    __syncthreads();
    const int count = found.begins[0] + found.counts[0];
    for (int k = group; k < count; k += groups) {
      const int64_t of = found.row[k], from = until - found.missed[k] + 1, grad_at = (base + found.place[k]) * t.dim;
      if constexpr (RULE == kRowwiseAdagrad) {
        const int64_t column = static_cast<int64_t>(lane) * VEC;
        const bool inside = column < t.dim;
        Floats<VEC> p{}, grad{};
        if (inside) p = load<VEC>(t.p + of * t.dim + column);
        if (inside && work.grads) grad = load<VEC>(work.grads + grad_at + column);
        float first = t.first[of];
        Ring steps{work.steps, work.n_kept, (from - work.first_step) % work.n_kept};
        for (int64_t step = from; step <= until; ++step) {
          rowwise_step<VEC>(t, steps.next(), lane, lanes, Floats<VEC>{}, p, first);
        }
        if (work.grads) rowwise_step<VEC>(t, steps.next(), lane, lanes, grad, p, first);
        if (inside) store<VEC>(t.p + of * t.dim + column, p);
        __syncwarp(group_mask(lanes));  // all lanes have read `first` before one writes it
        if (lane == 0) t.first[of] = first;
      } else {
        for (int64_t column = static_cast<int64_t>(lane) * VEC; column < t.dim; column += lanes * VEC) {
          const int64_t at = of * t.dim + column;
          Columns<RULE, VEC> columns(t, at);
          Floats<VEC> grad{};
          if (work.grads) grad = load<VEC>(work.grads + grad_at + column);
          bool is_done = false;
          if constexpr (kIsQuick<RULE>) {
            if (found.missed[k] <= kQuickSteps) {
              is_done = columns.quick_steps(found.steps, found.missed[k],
                                            work.grads ? found.steps + kQuickSteps : nullptr, grad);
              if (!is_done) columns = Columns<RULE, VEC>(t, at);
            }
          }
          if (!is_done) {
            Ring steps{work.steps, work.n_kept, (from - work.first_step) % work.n_kept};
#pragma unroll 1
            for (int64_t step = from; step <= until; ++step) columns.step(steps.next(), Floats<VEC>{});
            if (work.grads) columns.step(steps.next(), grad);
          }
          columns.write(t, at);
        }
      }
    }
    __syncthreads();  // nobody gathers the next rows before all have moved these
  }
}

}  // namespace fastmtl::cuda
