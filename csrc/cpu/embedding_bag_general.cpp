// The lookups that the common embedding_bag leaves out, on torch tensors: check, allocate, run.
#include "core/embedding_bag_general.h"

#include <limits>
#include <mutex>

#include "cpu/embedding_bag_args.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kGrainRows = 64;  // rows a thread must have to be worth waking

struct Tables {
  std::vector<Tensor> kept;
  std::vector<AnyTable> views;
  std::vector<int64_t> rows, dims;

  explicit Tables(std::vector<Tensor> weights) {
    for (Tensor& weight : weights) {
      STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2, "a weight must be [V, D] on the CPU");
      const ScalarType dtype = weight.scalar_type();
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                      "a weight must be float32, bfloat16 or float16");
      const Width width = dtype == ScalarType::Float      ? Width::kF32
                          : dtype == ScalarType::BFloat16 ? Width::kBf16
                                                          : Width::kF16;
      kept.push_back(weight.is_contiguous() ? weight : torch::stable::contiguous(weight));
      views.push_back({kept.back().const_data_ptr(), width, weight.size(1)});
      rows.push_back(weight.size(0));
      dims.push_back(weight.size(1));
    }
  }
};

// The ids as they come from torch, checked: no offset leads out of the list, no bag out of the columns.
struct GeneralArgs {
  Tensor ids;
  std::optional<Tensor> scales, list, list_scales;
  std::vector<int64_t> ragged, offsets;
  std::vector<Bag> bags;
  GeneralIds view;
  int64_t n_ragged = 0;

  GeneralArgs(const Tensor& ids_given, const Tensor& plan, std::vector<int64_t> ragged_given,
              std::optional<Tensor> scales_given, std::optional<Tensor> list_given, std::optional<Tensor> offsets_given,
              std::optional<Tensor> list_scales_given, const std::vector<int64_t>& rows,
              const std::vector<int64_t>& dims, int64_t width)
      : ids(ids_given), scales(scales_given), list(list_given), list_scales(list_scales_given), ragged(ragged_given) {
    check_ids(ids);
    const int64_t n_rows = ids.size(0), n_bags = plan.size(0);
    const Bag* checked = checked_bags(plan, rows, dims, ids.size(1), width);
    bags.assign(checked, checked + n_bags);
    STD_TORCH_CHECK(static_cast<int64_t>(ragged.size()) == n_bags, "ragged must have an entry for each bag");
    if (offsets_given) take_offsets(*offsets_given, n_rows);
    std::vector<bool> seen(static_cast<size_t>(n_ragged), false);
    for (int64_t f = 0; f < n_bags; ++f) {
      STD_TORCH_CHECK(bags[f].pooling >= kSum && bags[f].pooling <= kMax, "bag ", f, " has no known pooling");
      if (ragged[f] < 0) continue;
      STD_TORCH_CHECK(ragged[f] < n_ragged && !seen[ragged[f]], "bag ", f, " has no ragged list of its own");
      STD_TORCH_CHECK(bags[f].length == 0 && bags[f].pooling != kConcat, "bag ", f, " is ragged and has columns");
      seen[ragged[f]] = true;
    }
    if (scales) {
      check_cpu(*scales, ScalarType::Float, 2, "scales");
      STD_TORCH_CHECK(scales->size(0) == n_rows && scales->size(1) == ids.size(1), "scales must be as large as ids");
    }
    if (list_scales) {
      check_cpu(*list_scales, ScalarType::Float, 1, "scales of the ragged ids");
      STD_TORCH_CHECK(list && list_scales->size(0) == list->size(0) && list_scales->is_contiguous(),
                      "scales of the ragged ids must be as many as these");
    }
    const auto any = [](const Tensor& t) { return AnyIds{t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; };
    view = {bags.data(),
            n_bags,
            ragged.data(),
            n_rows,
            ids.size(1),
            any(ids),
            ids.stride(0),
            ids.stride(1),
            scales ? scales->const_data_ptr<float>() : nullptr,
            scales ? scales->stride(0) : 0,
            scales ? scales->stride(1) : 0,
            list ? any(*list) : AnyIds{nullptr, true},
            list ? list->size(0) : 0,
            offsets.data(),
            list_scales ? list_scales->const_data_ptr<float>() : nullptr};
  }
  GeneralArgs(const GeneralArgs&) = delete;
  GeneralArgs& operator=(const GeneralArgs&) = delete;

  // The bags as plan_bwd is to see them: a ragged one as long as it is on average.
  std::vector<Bag> planned() const {
    std::vector<Bag> result = bags;
    for (size_t f = 0; f < result.size(); ++f) {
      if (ragged[f] >= 0 && view.n_rows > 0)
        result[f].length = 1 + view.n_list / view.n_rows / std::max<int64_t>(1, n_ragged);
    }
    return result;
  }

 private:
  void take_offsets(const Tensor& given, int64_t n_rows) {
    STD_TORCH_CHECK(list && list->is_cpu() && list->dim() == 1 && list->is_contiguous() &&
                        (list->scalar_type() == ScalarType::Long || list->scalar_type() == ScalarType::Int),
                    "ragged ids must be [N] int64 or int32, contiguous, on the CPU");
    const bool wide = given.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(given.is_cpu() && given.dim() == 2 && given.is_contiguous() && given.size(1) == n_rows + 1 &&
                        (wide || given.scalar_type() == ScalarType::Int),
                    "offsets must be [R, B + 1] int64 or int32, contiguous, on the CPU");
    const AnyIds from{given.const_data_ptr(), wide};
    n_ragged = given.size(0);
    offsets.resize(static_cast<size_t>(given.numel()));
    int64_t before = 0;
    for (size_t i = 0; i < offsets.size(); ++i) {
      offsets[i] = from[static_cast<int64_t>(i)];
      STD_TORCH_CHECK(offsets[i] >= before && offsets[i] <= list->size(0), "offsets must ascend and end at most at ",
                      list->size(0), ", but number ", i, " is ", offsets[i]);
      before = offsets[i];
    }
  }
};

Tensor embedding_bag_general_fwd(std::vector<Tensor> weights, const Tensor& ids, std::optional<Tensor> dense,
                                 const Tensor& plan, int64_t width, std::vector<int64_t> ragged,
                                 std::optional<Tensor> scales, std::optional<Tensor> list,
                                 std::optional<Tensor> offsets, std::optional<Tensor> list_scales) {
  const Tables tables(weights);
  const GeneralArgs args(ids, plan, ragged, scales, list, offsets, list_scales, tables.rows, tables.dims, width);
  const int64_t n_rows = ids.size(0);
  int64_t n_dense = 0;
  if (dense) {
    check_cpu(*dense, ScalarType::Float, 2, "dense");
    n_dense = dense->size(1);
    STD_TORCH_CHECK(dense->size(0) == n_rows && n_dense <= width, "dense does not fit the ids or the width");
  }
  Tensor result = empty_f32({n_rows, width});
  float* out = result.mutable_data_ptr<float>();
  BadId bad;
  std::mutex guard;
  torch::stable::parallel_for(0, n_rows, kGrainRows, [&](int64_t begin, int64_t end) {
    BadId mine;
    general_fwd(args.view, tables.views.data(), begin, end, out, width, nullptr, mine);
    for (int64_t b = begin; b < end && n_dense > 0; ++b) {
      const float* from = dense->const_data_ptr<float>() + b * dense->stride(0);
      for (int64_t d = 0; d < n_dense; ++d) out[(b + 1) * width - n_dense + d] = from[d * dense->stride(1)];
    }
    const std::lock_guard<std::mutex> lock(guard);
    bad.note(mine);
  });
  STD_TORCH_CHECK(bad.bag < 0, "bad id ", bad.id, " in row ", bad.row, ", bag ", bad.bag);
  return result;
}

Tensor empty_of(int64_t n, ScalarType dtype) {
  return torch::stable::empty({n}, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// For each weight: its rows (int64, ascending), and their gradients [n, D] in fp32; then the gradients of the scales
// and of the ragged ids' scales, [B, S] and [N], where there are such scales.
std::vector<Tensor> embedding_bag_general_bwd(const Tensor& grad, std::vector<Tensor> weights, const Tensor& ids,
                                              const Tensor& plan, std::vector<int64_t> ragged,
                                              std::optional<Tensor> scales, std::optional<Tensor> list,
                                              std::optional<Tensor> offsets, std::optional<Tensor> list_scales) {
  check_cpu(grad, ScalarType::Float, 2, "grad");
  const Tensor rows_dense = dense_rows(grad);
  const Tables tables(weights);
  const GeneralArgs args(ids, plan, ragged, scales, list, offsets, list_scales, tables.rows, tables.dims, grad.size(1));
  const GeneralIds& view = args.view;
  const int64_t n_rows = view.n_rows, n_columns = view.n_columns, n_bags = view.n_bags;
  const int64_t n_tables = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(grad.size(0) == n_rows, "grad has ", grad.size(0), " rows, ids has ", n_rows);
  constexpr int64_t kMostEntries = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(n_columns == 0 || n_rows <= (kMostEntries - std::min(kMostEntries, view.n_list)) / n_columns,
                  "a batch of ", n_rows, " x ", n_columns, " + ", view.n_list, " ids is too large for its gradient");
  STD_TORCH_CHECK(view.n_list <= kMostEntries, "a list of ", view.n_list, " ids is too long for its gradient");

  // what each bag's gradient needs: the counts of means, the winners of maxima
  std::vector<std::vector<float>> counted(static_cast<size_t>(n_bags));
  std::vector<std::vector<int32_t>> won(static_cast<size_t>(n_bags));
  std::vector<const float*> counts(static_cast<size_t>(n_bags), nullptr);
  std::vector<int32_t*> winners(static_cast<size_t>(n_bags), nullptr);
  std::vector<int64_t> bag_of(static_cast<size_t>(n_columns), -1);
  std::vector<int32_t> list_row(static_cast<size_t>(view.n_list), 0), list_bag(static_cast<size_t>(view.n_list), -1);
  for (int64_t f = 0; f < n_bags; ++f) {
    const Bag& bag = args.bags[f];
    std::fill_n(bag_of.begin() + bag.column, bag.length, f);
    for (int64_t b = 0; b < n_rows && ragged[f] >= 0; ++b) {
      std::fill(list_row.begin() + view.start(f, b), list_row.begin() + view.start(f, b + 1), static_cast<int32_t>(b));
      std::fill(list_bag.begin() + view.start(f, b), list_bag.begin() + view.start(f, b + 1), static_cast<int32_t>(f));
    }
    if (bag.pooling == kMean) {
      counted[f].resize(static_cast<size_t>(n_rows));
      counts[f] = counted[f].data();
    } else if (bag.pooling == kMax) {
      won[f].resize(static_cast<size_t>(n_rows * bag.dim));
      winners[f] = won[f].data();
    }
  }
  torch::stable::parallel_for(0, n_rows, kGrainRows, [&](int64_t begin, int64_t end) {
    BadId ignored;
    general_fwd(view, tables.views.data(), begin, end, nullptr, 0, winners.data(), ignored);
    for (int64_t f = 0; f < n_bags; ++f) {
      for (int64_t b = begin; b < end && counts[f]; ++b) counted[f][b] = view.count(f, b);
    }
  });

  const GeneralGrad from{view,
                         bag_of.data(),
                         list_row.data(),
                         list_bag.data(),
                         rows_dense.const_data_ptr<float>(),
                         rows_dense.stride(0),
                         counts.data(),
                         winners.data()};
  const int64_t threads = n_rows < 2 * kGrainRows ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  const std::vector<Bag> planned = args.planned();
  const std::vector<Unit> units =
      plan_bwd(planned.data(), n_bags, tables.rows.data(), tables.dims.data(),
               std::vector<bool>(static_cast<size_t>(n_tables), true), n_tables, n_rows, threads, 0.0);
  for (const Unit& unit : units) {
    STD_TORCH_CHECK(unit.end - unit.begin <= std::numeric_limits<uint32_t>::max(), "a table is too high");
  }
  const std::vector<std::vector<int64_t>> hands = deal(units, threads);
  std::vector<UnitIndex> found(units.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t hand = begin; hand < end; ++hand) {
      for (int64_t u : hands[hand]) found[u] = general_index(units[u], view);
    }
  });
  std::vector<Tensor> results;
  for (int64_t t = 0; t < n_tables; ++t) {
    int64_t n = 0;
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].table == t) n += static_cast<int64_t>(found[u].rows.size());
    }
    Tensor rows = empty_of(n, ScalarType::Long), values = empty_f32({n, tables.dims[t]});
    int64_t* to_rows = rows.mutable_data_ptr<int64_t>();
    float* to = values.mutable_data_ptr<float>();
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].table != t) continue;
      UnitIndex& index = found[u];
      const int64_t here = static_cast<int64_t>(index.rows.size());
      to_rows = std::copy(index.rows.begin(), index.rows.end(), to_rows);
      index.starts.push_back(static_cast<int64_t>(index.entries.size()));
      torch::stable::parallel_for(0, here, kGrainRows, [&](int64_t begin, int64_t end) {
        general_values(from, tables.dims[t], index.starts.data(), index.entries.data(), begin, end, to);
      });
      to += here * tables.dims[t];
    }
    results.push_back(rows);
    results.push_back(values);
  }
  float *dscales = nullptr, *dlist = nullptr;
  if (scales) {
    results.push_back(empty_f32({n_rows, n_columns}));
    dscales = results.back().mutable_data_ptr<float>();
    std::fill_n(dscales, n_rows * n_columns, 0.0f);
  }
  if (list_scales) {
    results.push_back(empty_f32({view.n_list}));
    dlist = results.back().mutable_data_ptr<float>();
    std::fill_n(dlist, view.n_list, 0.0f);
  }
  if (dscales || dlist) {
    torch::stable::parallel_for(0, n_rows, kGrainRows, [&](int64_t begin, int64_t end) {
      general_scale_grad(from, tables.views.data(), begin, end, dscales, dlist);
    });
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "embedding_bag_general_fwd(Tensor[] weights, Tensor ids, Tensor? dense, Tensor plan, int width, int[] ragged, "
      "Tensor? scales, Tensor? list, Tensor? offsets, Tensor? list_scales) -> Tensor");
  m.def(
      "embedding_bag_general_bwd(Tensor grad, Tensor[] weights, Tensor ids, Tensor plan, int[] ragged, "
      "Tensor? scales, Tensor? list, Tensor? offsets, Tensor? list_scales) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("embedding_bag_general_fwd", FASTMTL_BOX(&embedding_bag_general_fwd));
  m.impl("embedding_bag_general_bwd", FASTMTL_BOX(&embedding_bag_general_bwd));
}

}  // namespace fastmtl::cpu
