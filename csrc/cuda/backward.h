// What runs after what: embedding_bag's backward and the optimizers' steps, as launches of the kernels.
//
// Device is what starts kernels and has memory:
//   run(kernel, blocks, shared_bytes, args...)   kThreads threads a block
//   scratch<T>(n) -> T*                          lives until the work is done
//   zero(pointer, n)                             n * sizeof(T) bytes
//   sort(keys, order, keys_out, order_out, n, bits)   stable, by the lowest `bits` bits
//   starts(keys, n, starts, n_starts)            where another key begins; ascending; their number, on the device
//   multiprocessors()
// None of it waits for the device, and no launch depends on what lies there: a step can be captured in a graph.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/kernels.cuh"
#include "cuda/table_rows.cuh"

namespace fastmtl::cuda {

struct Shape {
  int64_t n_rows, n_bags, n_sorted, n_tiny, n_table_rows;
};

struct Sorted {
  const uint32_t* keys = nullptr;
  const int32_t *order = nullptr, *tiny = nullptr;
  const float* counted = nullptr;
};

constexpr int64_t kTinyRoom = 6 * 1024;  // floats of shared memory for the sums of a tiny table

inline int64_t blocks_for(int64_t groups, int lanes, int64_t most) {
  const int64_t of_a_block = kThreads / lanes;
  return std::clamp<int64_t>((groups + of_a_block - 1) / of_a_block, 1, most);
}

// Lanes that own a row of `columns` vectors.
inline int lanes_for(int64_t vectors) {
  return static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(vectors, 1, 32))));
}

// The bits of keys from 0 to void_row: all that a sort has to look at.
inline int key_bits(int64_t void_row) { return std::bit_width(static_cast<uint64_t>(void_row)); }

// Where a Sorted is written.
struct SortedOut {
  uint32_t* keys;
  int32_t *order, *tiny;
  float* counted;
};

// All of the backward that depends on the ids alone: it may be made ahead of the gradient.
template <class Device>
void sort_rows(Device& device, const IdView& ids, const BagPlan* bags, const Shape& shape, const SortedOut& out) {
  const int64_t n = shape.n_rows * shape.n_sorted, work = shape.n_rows * shape.n_bags;
  if (work == 0) return;
  auto* keys = device.template scratch<uint32_t>(n);
  auto* order = device.template scratch<int32_t>(n);
  device.run(linearise_kernel, blocks_for(work, 1, 16 * device.multiprocessors()), 0, ids, bags, shape.n_rows,
             shape.n_bags, shape.n_sorted, shape.n_tiny, static_cast<uint32_t>(shape.n_table_rows), keys, order,
             out.tiny, out.counted);
  if (n > 0) device.sort(keys, order, out.keys, out.order, n, key_bits(shape.n_table_rows));
}

// The same into memory of the device's own.
template <class Device>
Sorted sort_rows(Device& device, const IdView& ids, const BagPlan* bags, const Shape& shape) {
  const int64_t n = shape.n_rows * shape.n_sorted;
  const SortedOut out = {device.template scratch<uint32_t>(n), device.template scratch<int32_t>(n),
                         device.template scratch<int32_t>(shape.n_rows * shape.n_tiny),
                         device.template scratch<float>(shape.n_rows * shape.n_bags)};
  sort_rows(device, ids, bags, shape, out);
  return {out.keys, out.order, out.tiny, out.counted};
}

// The rows of sorted lookups; `vec` is 4 where rows and gradients can be read 16 bytes at a time, else 1.
template <int RULE, int VEC, class Device>
void add_segments(Device& device, const Lookups& in, const Target& t) {
  if (in.n == 0) return;
  const int lanes = lanes_for((t.dim + VEC - 1) / VEC);
  auto* starts = device.template scratch<int32_t>(in.n);
  auto* counts = device.template scratch<int32_t>(2);  // segments, long ones
  auto* long_list = device.template scratch<int32_t>(in.n / kLong + 1);
  device.zero(counts, 2);
  device.starts(in.keys, in.n, starts, counts);
  const int64_t most = 16 * device.multiprocessors();
  device.run(short_segments_kernel<RULE, VEC>, blocks_for(in.n, lanes, most), 0, in, starts, counts, t, lanes,
             long_list, counts + 1);
  const int64_t shared = kThreads / lanes * t.dim * static_cast<int64_t>(sizeof(float));
  device.run(long_segments_kernel<RULE, VEC>, std::min(in.n / kLong + 1, 2 * device.multiprocessors()), shared, in,
             starts, counts, t, lanes, long_list, counts + 1);
}

// The tiny tables: `widest` is the largest vocabulary among them.
template <int RULE, int VEC, class Device>
void add_tiny_tables(Device& device, TinyTables tiny, int64_t widest, const Gradient& grad, const float* counted,
                     int32_t n_bags, bool mean, const Target& t, int64_t void_row) {
  if (tiny.n_tables == 0) return;
  const int64_t columns = std::min<int64_t>(t.dim, kTinyColumns), n_blocks = (t.dim + kTinyColumns - 1) / kTinyColumns;
  const int lanes = lanes_for(columns);
  // a sum of its own for each walker where tables are small, and at least one of the widest
  const int64_t room = std::max<int64_t>(kTinyRoom, widest * (columns + 1));
  // enough runs to fill the machine, none so short that clearing and adding up outweigh its rows
  const int64_t wanted = std::max<int64_t>(8 * device.multiprocessors() / (tiny.n_tables * n_blocks), 1);
  tiny.run_rows = std::max<int64_t>((tiny.n_rows + wanted - 1) / wanted, 256);
  tiny.n_runs = static_cast<int32_t>((tiny.n_rows + tiny.run_rows - 1) / tiny.run_rows);
  auto* sums = device.template scratch<float>(static_cast<int64_t>(tiny.n_runs) * tiny.n_tiny_rows * t.dim);
  auto* hits = device.template scratch<int32_t>(static_cast<int64_t>(tiny.n_runs) * tiny.n_tiny_rows);
  if (tiny.n_runs > 0) {
    device.run(tiny_tables_kernel, static_cast<int64_t>(tiny.n_runs) * tiny.n_tables * n_blocks,
               room * static_cast<int64_t>(sizeof(float)), tiny, grad, counted, n_bags, mean, t.dim,
               static_cast<int>(room), lanes, sums, hits);
  }
  const int row_lanes = lanes_for((t.dim + VEC - 1) / VEC);
  device.run(tiny_tables_sum_kernel<RULE, VEC>, tiny.n_tiny_rows, tiny_sum_bytes(row_lanes, t.dim), tiny, sums, hits, t,
             static_cast<int64_t>(void_row), row_lanes);
}

template <int RULE, int VEC, class Device>
void update_rows(Device& device, const Target& t, const Work& work) {
  if (work.n == 0) return;
  const int lanes = lanes_for((t.dim + VEC - 1) / VEC);
  // many rows at a time sort well, as long as the machine is full
  const int64_t share = work.n / (4 * device.multiprocessors());
  const auto gathered = static_cast<int>(std::clamp<int64_t>(
      static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(share))), kThreads / lanes, kGathered));
  const int64_t blocks = std::min<int64_t>((work.n + gathered - 1) / gathered, 1 << 20);
  device.run(table_rows_kernel<RULE, VEC>, blocks, Gathered::bytes(gathered), t, work, lanes, gathered);
}

// f.template operator()<RULE, VEC>() for a rule that is known when the program runs. False: there is no such rule.
template <class F>
bool with_rule(int64_t rule, bool vectors, const F& f) {
  const auto of = [&]<int RULE>() {
    if (vectors) {
      f.template operator()<RULE, 4>();
    } else {
      f.template operator()<RULE, 1>();
    }
    return true;
  };
  switch (rule) {
    case kNoRule:
      return of.template operator()<kNoRule>();
    case kSgd:
      return of.template operator()<kSgd>();
    case kMomentum:
      return of.template operator()<kMomentum>();
    case kNesterov:
      return of.template operator()<kNesterov>();
    case kAdam:
      return of.template operator()<kAdam>();
    case kAdamW:
      return of.template operator()<kAdamW>();
    case kAdagrad:
      return of.template operator()<kAdagrad>();
    case kRowwiseAdagrad:
      return of.template operator()<kRowwiseAdagrad>();
    default:
      return false;
  }
}

}  // namespace fastmtl::cuda
