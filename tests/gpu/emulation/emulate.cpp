// Runs the CUDA kernels on the CPU: emulate FOLDER name=number... reads FOLDER/<array>.bin, writes what changed back.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "arrays.h"
#include "cuda_on_cpu.h"

// the device's shared memory: blocks run one at a time
namespace fastmtl::cuda {
constexpr int64_t kSharedFloats = 1 << 16;
alignas(16) float partial[kSharedFloats];
}  // namespace fastmtl::cuda

#include "cuda/backward.h"

namespace {

using namespace fastmtl::cuda;

struct Host {
  std::vector<std::vector<char>> memory;
  template <class T>
  T* scratch(int64_t n) {
    memory.emplace_back(sizeof(T) * static_cast<size_t>(n), static_cast<char>(0xcd));  // no luck with zeros
    return reinterpret_cast<T*>(memory.back().data());
  }
  template <class T>
  void zero(T* at, int64_t n) {
    std::fill(at, at + n, T{});
  }
  template <class Kernel, class... Args>
  void run(Kernel kernel, int64_t blocks, int64_t shared, Args... args) {
    if (shared > kSharedFloats * 4) std::abort();
    std::fill(partial, partial + kSharedFloats, -1e30f);
    emulated::run(kernel, static_cast<unsigned>(blocks), kThreads, args...);
  }
  void sort(const uint32_t* keys, const int32_t* order, uint32_t* keys_out, int32_t* order_out, int64_t n, int bits) {
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    std::vector<int64_t> by(static_cast<size_t>(n));
    std::iota(by.begin(), by.end(), 0);
    std::stable_sort(by.begin(), by.end(), [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
    for (int64_t i = 0; i < n; ++i) {
      keys_out[i] = keys[by[static_cast<size_t>(i)]];
      order_out[i] = order[by[static_cast<size_t>(i)]];
    }
  }
  void starts(const uint32_t* keys, int64_t n, int32_t* out, int32_t* count) {
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || keys[i] != keys[i - 1]) out[(*count)++] = static_cast<int32_t>(i);
    }
  }
  int64_t multiprocessors() const { return 1; }
};

// The arrays of a table, read and written back.
struct Table {
  std::vector<float> out = read<float>("out"), p = read<float>("p"), first = read<float>("first"),
                     second = read<float>("second");
  std::vector<int64_t> rows = read<int64_t>("rows");
  std::vector<int32_t> last = read<int32_t>("last"), now = read<int32_t>("now");
  std::vector<fastmtl::Step> steps = read<fastmtl::Step>("steps");

  Target target() {
    return {out.data(),    rows.empty() ? nullptr : rows.data(),
            p.data(),      first.data(),
            second.data(), last.data(),
            steps.data(),  now.data(),
            number("dim")};
  }
  void save() const {
    write("out", out), write("p", p), write("first", first), write("second", second), write("rows", rows);
    write("last", last);
  }
};

template <int RULE, int VEC>
void backward() {
  Host host;
  const auto ids = read<int64_t>("ids");
  const auto bags = read<BagPlan>("bags");
  const auto columns = read<int32_t>("columns"), tables = read<int32_t>("tables"), lookups = read<int32_t>("lookups");
  const auto places = read<int64_t>("places");
  const auto grad = read<char>("grad");
  const Shape shape = {number("n_rows"), static_cast<int64_t>(bags.size()), static_cast<int64_t>(columns.size() / 2),
                       number("n_tiny"), number("n_table_rows")};
  Table table;
  Target t = table.target();
  const Sorted sorted = sort_rows(host, {ids.data(), number("n_ids"), 1, true}, bags.data(), shape);
  const Gradient gradient = {grad.data(), number("grad_stride"), number("half") != 0};
  const auto n_bags = static_cast<int32_t>(shape.n_bags);
  const bool mean = number("mean") != 0;
  add_segments<RULE, VEC>(
      host,
      {sorted.keys, sorted.order, gradient, columns.data(), sorted.counted, shape.n_rows * shape.n_sorted,
       static_cast<uint32_t>(shape.n_table_rows), static_cast<int32_t>(shape.n_sorted), n_bags, mean},
      t);
  if (t.rows) {  // the tiny tables' rows are listed behind the others
    t.rows += number("n_listed");
    t.out += number("n_listed") * t.dim;
  }
  const TinyTables tiny = {sorted.tiny,
                           tables.data(),
                           lookups.data(),
                           places.data(),
                           shape.n_rows,
                           0,
                           static_cast<int32_t>(tables.size() / 4),
                           static_cast<int32_t>(shape.n_tiny),
                           static_cast<int32_t>(places.size()),
                           0};
  int64_t widest = 1;
  for (size_t i = 0; i < tables.size(); i += 4) widest = std::max<int64_t>(widest, tables[i]);
  add_tiny_tables<RULE, VEC>(host, tiny, widest, gradient, sorted.counted, n_bags, mean, t, shape.n_table_rows);
  table.save();
}

template <int RULE, int VEC>
void update() {
  Host host;
  Table table;
  const auto listed = read<int64_t>("listed");
  const auto grads = read<float>("grads");
  const auto clock = read<int32_t>("clock");
  std::vector<int32_t> behind(1);
  const std::vector<uint32_t> keys(listed.begin(), listed.end());
  const Work work = {number("is_listed") == 1 ? listed.data() : nullptr,
                     number("is_listed") == 2 ? keys.data() : nullptr,
                     number("given") ? grads.data() : nullptr,
                     number("n"),
                     number("start"),
                     number("n_table_rows"),
                     table.steps.data(),
                     number("first_step"),
                     static_cast<int64_t>(table.steps.size()),
                     number("upto"),
                     clock.empty() ? nullptr : clock.data(),
                     number("lazily") != 0,
                     behind.data()};
  Target t = table.target();
  t.rows = nullptr;
  if constexpr (RULE != kNoRule) update_rows<RULE, VEC>(host, t, work);
  table.save();
  write("behind", behind);
}

}  // namespace

int main(int argc, char** argv) {
  if (!read_arguments(argc, argv)) return 2;
  const bool is_update = number("is_update") != 0;
  const bool known = with_rule(number("rule"), number("vectors") != 0, [&]<int RULE, int VEC>() {
    if (is_update) {
      update<RULE, VEC>();
    } else {
      backward<RULE, VEC>();
    }
  });
  return known ? 0 : 5;
}
