// embedding_bag on torch tensors: check, allocate, run. What the op means is in fastmtl/ops/embedding_bag.py.
#include "core/embedding_bag.h"

#include <algorithm>
#include <limits>
#include <mutex>

#include "core/embedding_bag_sparse.h"
#include "cpu/embedding_bag_args.h"
#include "cpu/ops.h"

namespace fastmtl::cpu {
namespace {

// Lookups that a thread must have to be worth waking: some 100 us, where a sleeping one takes 60 us to come.
constexpr int64_t kGrainLookups = int64_t{1} << 15;

int64_t useful_threads(const Tensor& ids) {
  const int64_t threads = ids.size(0) * ids.size(1) / kGrainLookups;
  return std::clamp<int64_t>(threads, 1, torch::stable::get_num_threads());
}

}  // namespace

// A message that starts with "bad id" is how a refused id reaches Python.
Tensor embedding_bag_fwd(std::vector<Tensor> weights, const Tensor& ids, std::optional<Tensor> dense,
                         const Tensor& plan, int64_t width) {
  check_ids(ids);
  const int64_t n_rows = ids.size(0);
  std::vector<int64_t> rows, dims;
  std::vector<const float*> tables;
  for (Tensor& weight : weights) {
    check_cpu(weight, ScalarType::Float, 2, "weight");
    if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
    rows.push_back(weight.size(0));
    dims.push_back(weight.size(1));
    tables.push_back(weight.const_data_ptr<float>());
  }
  const Bag* bags = checked_bags(plan, rows, dims, ids.size(1), width);
  const int64_t n_bags = plan.size(0);
  const float* dense_data = nullptr;
  int64_t n_dense = 0, dense_row = 0, dense_column = 0;
  if (dense) {
    check_cpu(*dense, ScalarType::Float, 2, "dense");
    n_dense = dense->size(1);
    STD_TORCH_CHECK(dense->size(0) == n_rows && n_dense <= width, "dense does not fit the ids or the width");
    dense_data = dense->const_data_ptr<float>();
    dense_row = dense->stride(0);
    dense_column = dense->stride(1);
  }

  Tensor result = empty_f32({n_rows, width});
  float* out = result.mutable_data_ptr<float>();
  BadId bad;
  std::mutex guard;
  with_ids(ids, [&](const auto& view) {
    const int64_t grain = n_rows / useful_threads(ids) + 1;
    torch::stable::parallel_for(0, n_rows, grain, [&](int64_t begin, int64_t end) {
      BadId mine;
      fastmtl::embedding_bag_fwd(tables.data(), view, bags, n_bags, begin, end, out, width, mine);
      for (int64_t b = begin; b < end; ++b) {
        float* to = out + b * width + width - n_dense;
        const float* from = dense_data + b * dense_row;
        for (int64_t d = 0; d < n_dense; ++d) to[d] = from[d * dense_column];
      }
      if (mine.bag >= 0) {
        const std::lock_guard<std::mutex> lock(guard);
        bad.note(mine);
      }
    });
  });
  STD_TORCH_CHECK(bad.bag < 0, "bad id ", bad.id, " in row ", bad.row, ", bag ", bad.bag);
  return result;
}

namespace {

// The weights whose gradient is asked for: `shapes` holds the rows and the width of each, rows < 0 (-1 - rows): not
// wanted.
struct Wanted {
  std::vector<int64_t> rows, dims;
  std::vector<bool> needs;

  explicit Wanted(const std::vector<int64_t>& shapes) {
    for (size_t t = 0; t + 1 < shapes.size(); t += 2) {
      needs.push_back(shapes[t] >= 0);
      rows.push_back(shapes[t] >= 0 ? shapes[t] : -(shapes[t] + 1));
      dims.push_back(shapes[t + 1]);
    }
  }
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// Bags without padding whose ids are neighbours, so that a row's can be told good and counted through at once.
class Neighbours {
 public:
  Neighbours(const Bag* bags, int64_t n_bags) {
    int64_t first = 0;
    for (int64_t f = 0; f < n_bags; first += bags[f++].vocab) {
      if (bags[f].n_pad > 0 || bags[f].column != bags[0].column + f) return;
      firsts_.push_back(static_cast<int32_t>(first));
      last_.push_back(bags[f].vocab - 1);
    }
    column_ = n_bags > 0 ? bags[0].column : 0;
  }

  // False: it was not done, or an id is outside its vocabulary.
  template <class Id>
  bool pick(const Ids<Id>& ids, int64_t row, int32_t* to) const {
    if (column_ < 0 || ids.column_stride != 1) return false;
    const Id* from = ids.data + row * ids.row_stride + column_;
    const int64_t n = static_cast<int64_t>(firsts_.size());
    uint64_t bad = 0;  // its first bit: of a negative one, or one behind the last
    for (int64_t f = 0; f < n; ++f) {
      const uint64_t id = static_cast<uint64_t>(static_cast<int64_t>(from[f]));
      bad |= id | (static_cast<uint64_t>(last_[f]) - id);
      to[f] = static_cast<int32_t>(static_cast<uint32_t>(firsts_[f]) + static_cast<uint32_t>(id));
    }
    return bad >> 63 == 0;
  }

 private:
  int64_t column_ = -1;  // < 0: they are none such
  std::vector<int32_t> firsts_;
  std::vector<int64_t> last_;
};

}  // namespace

// For each bag, which reads one id: of all bags' rows counted through, the one that a row of the batch reads, or their
// number where it reads none. [B, F] int32.
Tensor embedding_bag_picks(const Tensor& ids, const Tensor& plan, std::vector<int64_t> shapes) {
  check_ids(ids);
  const Wanted weights(shapes);
  const Bag* bags =
      checked_bags(plan, weights.rows, weights.dims, ids.size(1), std::numeric_limits<int64_t>::max() / 2);
  const int64_t n_rows = ids.size(0), n_bags = plan.size(0);
  int64_t all = 0;
  for (int64_t f = 0; f < n_bags; ++f) {
    STD_TORCH_CHECK(bags[f].length == 1, "bag ", f, " reads ", bags[f].length, " ids of a row, not one");
    all += bags[f].vocab;
    STD_TORCH_CHECK(all <= std::numeric_limits<int32_t>::max(), "the bags have too many rows");
  }
  Tensor result = torch::stable::empty({n_rows, n_bags}, ScalarType::Int, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CPU));
  int32_t* to = result.mutable_data_ptr<int32_t>();
  BadId bad;
  with_ids(ids, [&](const auto& view) {
    const Neighbours plain(bags, n_bags);
    for (int64_t b = 0; b < n_rows; ++b, to += n_bags) {
      if (plain.pick(view, b, to)) continue;
      int64_t first = 0;
      for (int64_t f = 0; f < n_bags; first += bags[f++].vocab) {
        const int64_t id = view(b, bags[f].column), row = resolve(bags[f], id);
        if (row == kRefused) bad.note({f, b, bags[f].column, id});
        to[f] = static_cast<int32_t>(row >= 0 ? first + row : all);
      }
    }
  });
  STD_TORCH_CHECK(bad.bag < 0, "bad id ", bad.id, " in row ", bad.row, ", bag ", bad.bag);
  return result;
}

// The wanted gradients of the weights.
std::vector<Tensor> embedding_bag_grads(const RowsOfGrad& grad, const Tensor& ids, const Tensor& plan,
                                        const std::vector<int64_t>& shapes) {
  check_ids(ids);
  const int64_t n_rows = ids.size(0);
  STD_TORCH_CHECK(grad.rows == n_rows, "grad has ", grad.rows, " rows, ids has ", n_rows);
  const Wanted wanted(shapes);
  const std::vector<int64_t>&rows = wanted.rows, &dims = wanted.dims;
  std::vector<Tensor> results;
  std::vector<float*> out(wanted.rows.size(), nullptr);
  for (int64_t t = 0; t < wanted.size(); ++t) {
    if (!wanted.needs[t]) continue;
    results.push_back(empty_f32({rows[t], dims[t]}));
    out[t] = results.back().mutable_data_ptr<float>();
  }
  const Bag* bags = without_max(checked_bags(plan, rows, dims, ids.size(1), grad.columns), plan.size(0));
  const int64_t threads = useful_threads(ids);
  const std::vector<Unit> units =
      plan_bwd(bags, plan.size(0), rows.data(), dims.data(), wanted.needs, wanted.size(), n_rows, threads);
  const std::vector<std::vector<int64_t>> hands = deal(units, threads);
  with_ids(ids, [&](const auto& view) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t hand = begin; hand < end; ++hand) {
        for (int64_t u : hands[hand]) {
          const Unit& unit = units[u];
          fastmtl::embedding_bag_bwd(unit, bags, dims[unit.table], grad.data, grad.stride, view, n_rows,
                                     out[unit.table]);
        }
      }
    });
  });
  return results;
}

namespace {

std::vector<Tensor> embedding_bag_bwd(const Tensor& grad, const Tensor& ids, const Tensor& plan,
                                      std::vector<int64_t> shapes) {
  check_cpu(grad, ScalarType::Float, 2, "grad");
  const Tensor rows = dense_rows(grad);
  return embedding_bag_grads({rows.const_data_ptr<float>(), rows.size(0), rows.size(1), rows.stride(0)}, ids, plan,
                             shapes);
}

Tensor empty_of(int64_t n, ScalarType dtype) {
  return torch::stable::empty({n}, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// For each wanted weight the rows that the batch looks up (int64, ascending), where their entries start (int64), and
// the entries (int32), as core/embedding_bag_sparse.h describes them. `alone`: on the calling thread, which wakes no
// other.
std::vector<Tensor> embedding_bag_index(const Tensor& ids, const Tensor& plan, std::vector<int64_t> shapes,
                                        bool alone) {
  check_ids(ids);
  const Wanted wanted(shapes);
  const Bag* bags = checked_bags(plan, wanted.rows, wanted.dims, ids.size(1), std::numeric_limits<int64_t>::max() / 2);
  const int64_t n_rows = ids.size(0), n_columns = ids.size(1);
  STD_TORCH_CHECK(n_columns == 0 || n_rows <= std::numeric_limits<int32_t>::max() / n_columns, "a batch of ", n_rows,
                  " x ", n_columns, " ids is too large for a sparse gradient");
  for (int64_t height : wanted.rows) {
    STD_TORCH_CHECK(height <= std::numeric_limits<uint32_t>::max(), "a table of ", height,
                    " rows is too high for a sparse gradient");
  }
  const int64_t threads = alone ? 1 : useful_threads(ids);
  const std::vector<Unit> units = plan_bwd(bags, plan.size(0), wanted.rows.data(), wanted.dims.data(), wanted.needs,
                                           wanted.size(), n_rows, threads, 0.0);
  const std::vector<std::vector<int64_t>> hands = deal(units, threads);
  std::vector<UnitIndex> found(units.size());
  with_ids(ids, [&](const auto& view) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t hand = begin; hand < end; ++hand) {
        for (int64_t u : hands[hand]) found[u] = index_unit(units[u], bags, view, n_rows, n_columns);
      }
    });
  });
  std::vector<Tensor> results;
  for (int64_t t = 0; t < wanted.size(); ++t) {
    if (!wanted.needs[t]) continue;
    int64_t n = 0, n_entries = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].table != t) continue;
      n += static_cast<int64_t>(found[u].rows.size());
      n_entries += static_cast<int64_t>(found[u].entries.size());
    }
    Tensor rows = empty_of(n, ScalarType::Long), starts = empty_of(n + 1, ScalarType::Long);
    Tensor entries = empty_of(n_entries, ScalarType::Int);
    int64_t* to_rows = rows.mutable_data_ptr<int64_t>();
    int64_t* to_starts = starts.mutable_data_ptr<int64_t>();
    int32_t* to_entries = entries.mutable_data_ptr<int32_t>();
    int64_t at = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].table != t) continue;
      to_rows = std::copy(found[u].rows.begin(), found[u].rows.end(), to_rows);
      for (int64_t start : found[u].starts) *to_starts++ = at + start;
      to_entries = std::copy(found[u].entries.begin(), found[u].entries.end(), to_entries);
      at += static_cast<int64_t>(found[u].entries.size());
    }
    *to_starts = at;
    results.push_back(rows);
    results.push_back(starts);
    results.push_back(entries);
  }
  return results;
}

// The gradients of the rows of an index, [n, D] for each wanted weight.
std::vector<Tensor> embedding_bag_bwd_sparse(const Tensor& grad, const Tensor& ids, const Tensor& plan,
                                             std::vector<int64_t> shapes, std::vector<Tensor> index) {
  check_cpu(grad, ScalarType::Float, 2, "grad");
  check_ids(ids);
  const Tensor rows_dense = dense_rows(grad);
  const Wanted wanted(shapes);
  const Bag* bags = without_max(checked_bags(plan, wanted.rows, wanted.dims, ids.size(1), grad.size(1)), plan.size(0));
  const int64_t n_rows = ids.size(0), n_columns = ids.size(1), n_bags = plan.size(0);
  STD_TORCH_CHECK(grad.size(0) == n_rows, "grad has ", grad.size(0), " rows, ids has ", n_rows);
  std::vector<int64_t> bag_of(static_cast<size_t>(n_columns), -1);
  std::vector<std::vector<float>> counted(static_cast<size_t>(n_bags));
  std::vector<const float*> counts(static_cast<size_t>(n_bags), nullptr);
  for (int64_t f = 0; f < n_bags; ++f) {
    std::fill_n(bag_of.begin() + bags[f].column, bags[f].length, f);
    if (bags[f].pooling != kMean || bags[f].length == 1) continue;
    counted[f].resize(static_cast<size_t>(n_rows));
    with_ids(ids, [&](const auto& view) { count_bag(bags[f], view, n_rows, counted[f].data()); });
    counts[f] = counted[f].data();
  }
  const SparseGrad from{
      bags, bag_of.data(), n_rows, n_columns, rows_dense.const_data_ptr<float>(), rows_dense.stride(0), counts.data()};
  std::vector<Tensor> results;
  size_t at = 0;
  for (int64_t t = 0; t < wanted.size(); ++t) {
    if (!wanted.needs[t]) continue;
    STD_TORCH_CHECK(at + 3 <= index.size(), "the index lacks a weight");
    const Tensor &starts = index[at + 1], &entries = index[at + 2];
    check_cpu(starts, ScalarType::Long, 1, "starts");
    check_cpu(entries, ScalarType::Int, 1, "entries");
    STD_TORCH_CHECK(starts.is_contiguous() && entries.is_contiguous() && starts.size(0) >= 1, "malformed index");
    at += 3;
    const int64_t n = starts.size(0) - 1, n_entries = entries.size(0);
    const int64_t* from_starts = starts.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(from_starts[i] >= 0 && from_starts[i] <= from_starts[i + 1], "malformed index");
    }
    STD_TORCH_CHECK(from_starts[n] <= n_entries, "malformed index");
    Tensor values = empty_f32({n, wanted.dims[t]});
    float* to = values.mutable_data_ptr<float>();
    const int32_t* from_entries = entries.const_data_ptr<int32_t>();
    // shares of equal work: a row of a tiny table has thousands of entries, most have one
    const int64_t threads = useful_threads(ids), pieces = threads == 1 ? 1 : 4 * threads;
    const auto cut = [&](int64_t piece) {
      if (piece == pieces) return n;
      return std::lower_bound(from_starts, from_starts + n, n_entries * piece / pieces) - from_starts;
    };
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      embedding_bag_values(from, wanted.dims[t], from_starts, from_entries, cut(begin), cut(end), to);
    });
    results.push_back(values);
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def("embedding_bag_fwd(Tensor[] weights, Tensor ids, Tensor? dense, Tensor plan, int width) -> Tensor");
  m.def("embedding_bag_picks(Tensor ids, Tensor plan, int[] shapes) -> Tensor");
  m.def("embedding_bag_bwd(Tensor grad, Tensor ids, Tensor plan, int[] shapes) -> Tensor[]");
  m.def("embedding_bag_index(Tensor ids, Tensor plan, int[] shapes, bool alone=False) -> Tensor[]");
  m.def("embedding_bag_bwd_sparse(Tensor grad, Tensor ids, Tensor plan, int[] shapes, Tensor[] index) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("embedding_bag_fwd", FASTMTL_BOX(&embedding_bag_fwd));
  m.impl("embedding_bag_picks", FASTMTL_BOX(&embedding_bag_picks));
  m.impl("embedding_bag_bwd", FASTMTL_BOX(&embedding_bag_bwd));
  m.impl("embedding_bag_index", FASTMTL_BOX(&embedding_bag_index));
  m.impl("embedding_bag_bwd_sparse", FASTMTL_BOX(&embedding_bag_bwd_sparse));
}

}  // namespace fastmtl::cpu
