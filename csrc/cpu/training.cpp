// Steps of a small model, each as one op: lookup, layers, losses, gradients and optimizer. All that stays the same from
// step to step is kept under a number. What the ops mean is in fastmtl/backends/native_training.py.
#include <algorithm>
#include <bit>
#include <mutex>
#include <optional>
#include <tuple>

#include "cpu/ops.h"
#include "cpu/registry.h"

namespace fastmtl::cpu {
namespace {

bool all_finite(const Tensor& values) {
  constexpr uint32_t kInfinity = 0x7F800000;
  const int64_t columns = values.size(1), stride = values.stride(1);
  uint32_t most = 0;
  for (int64_t b = 0; b < values.size(0); ++b) {
    const float* row = values.const_data_ptr<float>() + b * values.stride(0);
    for (int64_t c = 0; c < columns; ++c) {
      most = std::max(most, std::bit_cast<uint32_t>(row[c * stride]) & kInfinity);
    }
  }
  return most != kInfinity;
}

// How a batch is looked up, and which of the weights get gradients.
struct TrainedLookup {
  std::vector<Tensor> weights;
  Tensor plan;  // without the bags of folded tables
  int64_t width;
  std::vector<int64_t> wanted;  // as embedding_bag_bwd takes them; not those whose gradient is the folded tables' alone
  std::optional<Tensor> places, small_plan;  // of folded tables
  size_t small_weight;                       // whose rows these are
};

// Where the gradients of folded tables go.
struct FoldedGrads {
  Tensor rows;   // of the weight, ascending
  Tensor among;  // for each of the tables' rows counted through the place of its row there
  bool are_all;  // the weight has no other gradient
};

struct TrainedLayers {
  std::vector<Tensor> learned, running, plans, batch_counters;
  std::vector<double> dropouts;
  bool bf16;
  Tensor is_classification;
  int64_t x_columns;
};

// Parameters that take a step together: `at` says which, counted through the layers' and then the weights.
struct MovedTogether {
  std::vector<int64_t> at;
  std::vector<Tensor> states, counters;
  int64_t rule;
};

class Training {
 public:
  Training(TrainedLookup lookup, TrainedLayers layers, std::optional<FoldedGrads> folded)
      : lookup_(std::move(lookup)), layers_(std::move(layers)), folded_(std::move(folded)) {
    STD_TORCH_CHECK(lookup_.wanted.size() == 2 * lookup_.weights.size(), "wanted needs rows and width of each weight");
    for (const Tensor& weight : lookup_.weights) check_cpu(weight, ScalarType::Float, 2, "weight");
    STD_TORCH_CHECK(lookup_.places.has_value() == lookup_.small_plan.has_value(),
                    "places and a plan of the folded tables must be given together");
    for (const Tensor& counter : layers_.batch_counters) {
      check_cpu(counter, ScalarType::Long, 1, "a counter of batches");
      STD_TORCH_CHECK(counter.is_contiguous(), "a counter of batches must be contiguous");
    }
    STD_TORCH_CHECK(lookup_.small_weight < std::max<size_t>(1, lookup_.weights.size()), "there is no weight ",
                    lookup_.small_weight);
    if (!folded_) return;
    const FoldedGrads& f = *folded_;
    STD_TORCH_CHECK(lookup_.places.has_value(), "there are no folded tables to have gradients");
    const int64_t height = lookup_.weights[lookup_.small_weight].size(0);
    check_cpu(f.rows, ScalarType::Long, 1, "rows");
    check_cpu(f.among, ScalarType::Long, 1, "among");
    STD_TORCH_CHECK(f.rows.is_contiguous() && f.among.is_contiguous(), "rows and among must be contiguous");
    const auto within = [](const Tensor& tensor, int64_t limit) {
      const int64_t* data = tensor.const_data_ptr<int64_t>();
      return std::all_of(data, data + tensor.size(0), [&](int64_t i) { return i >= 0 && i < limit; });
    };
    STD_TORCH_CHECK(within(f.among, f.rows.size(0)) && within(f.rows, height),
                    "folded tables name rows that their weight lacks");
    STD_TORCH_CHECK(!f.are_all || f.rows.size(0) == height, "a weight without other gradients has rows without any");
    const int64_t other = lookup_.wanted[2 * lookup_.small_weight];
    STD_TORCH_CHECK(f.are_all ? other < 0 : other == height, "the weight's gradient has not its rows");
  }

  void add_rule(MovedTogether rule) {
    const auto n = static_cast<int64_t>(layers_.learned.size() + lookup_.weights.size());
    for (int64_t i : rule.at) STD_TORCH_CHECK(i >= 0 && i < n, "there is no parameter ", i);
    const std::lock_guard lock(guard_);
    rules_.push_back(std::move(rule));
  }

  // The losses, the logits, and whether the step was taken: not where a loss is NaN, or where a counter of the
  // optimizer is not `counts` - 1. `numbers` and `counts` have those of one rule behind the other's.
  std::tuple<Tensor, Tensor, bool> step(const Tensor& ids, const std::optional<Tensor>& dense, const Tensor& labels,
                                        const Tensor& factors, const std::vector<int64_t>& seeds,
                                        const std::vector<double>& numbers, const std::vector<double>& counts) {
    const std::lock_guard lock(guard_);
    STD_TORCH_CHECK(counts.size() == rules_.size() && numbers.size() % std::max<size_t>(1, rules_.size()) == 0,
                    "each of the ", rules_.size(), " rules needs its numbers and its count");
    if (dense) {
      check_cpu(*dense, ScalarType::Float, 2, "dense");
      STD_TORCH_CHECK(all_finite(*dense), "dense values are not finite");
    }
    const Tensor row = embedding_bag_fwd(lookup_.weights, ids, dense, lookup_.plan, lookup_.width);
    std::optional<Tensor> picks, table;
    if (lookup_.places) {
      picks = embedding_bag_picks(ids, *lookup_.small_plan, shapes());
      table = lookup_.weights[lookup_.small_weight];
    }
    const int64_t n_rows = row.size(0);
    const Tensor x = torch::stable::from_blob(
        row.mutable_data_ptr(), {1, n_rows, lookup_.width}, {n_rows * lookup_.width, lookup_.width, 1},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
    if (n_rows > 1) {  // one row has no statistics
      for (const Tensor& counter : layers_.batch_counters) {
        int64_t* counts_of = counter.mutable_data_ptr<int64_t>();
        for (int64_t i = 0; i < counter.size(0); ++i) ++counts_of[i];
      }
    }
    std::vector<Tensor> found =
        chain_gradients(x, layers_.learned, layers_.running, layers_.plans, layers_.dropouts, seeds, layers_.bf16,
                        labels, layers_.is_classification, factors, layers_.x_columns, lookup_.places, table, picks);
    const auto n_learned = static_cast<std::ptrdiff_t>(layers_.learned.size());
    grads_.assign(found.begin() + 2, found.begin() + 2 + n_learned);
    add_table_grads(ids, found);
    const bool takes = no_nan(found[0]) && take_step(numbers, counts);
    return {found[0], found[1], takes};
  }

  // The last step's, of the layers' parameters and then of the weights; empty where there is none.
  std::vector<std::optional<Tensor>> grads() {
    const std::lock_guard lock(guard_);
    return grads_;
  }

 private:
  // Rows and width of each weight.
  std::vector<int64_t> shapes() const {
    std::vector<int64_t> all;
    for (const Tensor& weight : lookup_.weights) all.insert(all.end(), {weight.size(0), weight.size(1)});
    return all;
  }

  static bool no_nan(const Tensor& losses) {
    const float* loss = losses.const_data_ptr<float>();
    return std::none_of(loss, loss + losses.numel(), [](float x) { return x != x; });
  }

  // Those of the weights, from what chain_gradients found.
  void add_table_grads(const Tensor& ids, const std::vector<Tensor>& found) {
    const size_t at = grads_.size(), n = lookup_.weights.size(), behind = 2 + layers_.learned.size();
    grads_.resize(at + n);
    if (layers_.x_columns < 0) return;
    bool any = false;
    for (size_t t = 0; t < n; ++t) any |= lookup_.wanted[2 * t] >= 0;
    if (any) {
      const Tensor& dx = found[behind];
      auto given = embedding_bag_grads({dx.const_data_ptr<float>(), dx.size(1), dx.size(2), dx.size(2)}, ids,
                                       lookup_.plan, lookup_.wanted);
      auto next = given.begin();
      for (size_t t = 0; t < n; ++t) {
        if (lookup_.wanted[2 * t] >= 0) grads_[at + t] = *next++;
      }
    }
    if (folded_) add_folded_grads(found[behind + 1], grads_[at + lookup_.small_weight]);
  }

  // Those of the folded tables' rows [n, D], of which several may be one row of the weight.
  void add_folded_grads(const Tensor& of_small, std::optional<Tensor>& of_weight) const {
    const int64_t n = of_small.size(0), dim = of_small.size(1), n_rows = folded_->rows.size(0);
    STD_TORCH_CHECK(n == folded_->among.size(0), "the folded tables have ", n, " rows, not ", folded_->among.size(0));
    const int64_t* among = folded_->among.const_data_ptr<int64_t>();
    const float* from = of_small.const_data_ptr<float>();
    Tensor by_row = empty_f32({n_rows, dim});
    float* sums = by_row.mutable_data_ptr<float>();
    std::fill_n(sums, n_rows * dim, 0.0f);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < dim; ++d) sums[among[i] * dim + d] += from[i * dim + d];
    }
    if (folded_->are_all) {
      of_weight = by_row;
      return;
    }
    STD_TORCH_CHECK(of_weight && of_weight->size(1) == dim, "the folded tables have another width than their weight");
    const int64_t* rows = folded_->rows.const_data_ptr<int64_t>();
    float* to = of_weight->mutable_data_ptr<float>();
    for (int64_t i = 0; i < n_rows; ++i) {
      for (int64_t d = 0; d < dim; ++d) to[rows[i] * dim + d] += sums[i * dim + d];
    }
  }

  bool take_step(const std::vector<double>& numbers, const std::vector<double>& counts) {
    std::vector<DenseState> all;
    for (size_t r = 0; r < rules_.size(); ++r) {
      DenseState& state = all.emplace_back(DenseState{{}, {}, rules_[r].states, rules_[r].counters});
      for (int64_t i : rules_[r].at) {
        const auto n_learned = static_cast<int64_t>(layers_.learned.size());
        const std::optional<Tensor>& grad = grads_[static_cast<size_t>(i)];
        STD_TORCH_CHECK(grad, "parameter ", i, " has no gradient");
        state.params.push_back(i < n_learned ? layers_.learned[i] : lookup_.weights[i - n_learned]);
        state.grads.push_back(*grad);
      }
      if (!can_step(state, counts[r])) return false;
    }
    const size_t each = numbers.size() / std::max<size_t>(1, rules_.size());
    for (size_t r = 0; r < rules_.size(); ++r) {
      const auto first = numbers.begin() + static_cast<std::ptrdiff_t>(r * each);
      dense_step(std::move(all[r]), rules_[r].rule, {first, first + static_cast<std::ptrdiff_t>(each)}, counts[r]);
    }
    return true;
  }

  std::mutex guard_;  // one step at a time
  const TrainedLookup lookup_;
  const TrainedLayers layers_;
  const std::optional<FoldedGrads> folded_;
  std::vector<MovedTogether> rules_;
  std::vector<std::optional<Tensor>> grads_;
};

Registry<Training>& registry() { return Registry<Training>::global(); }

int64_t training_new(std::vector<Tensor> weights, const Tensor& plan, int64_t width, std::vector<int64_t> wanted,
                     std::optional<Tensor> places, std::optional<Tensor> small_plan, int64_t small_weight,
                     std::optional<Tensor> rows, std::optional<Tensor> among, bool are_all, std::vector<Tensor> learned,
                     std::vector<Tensor> running, std::vector<Tensor> plans, std::vector<Tensor> batch_counters,
                     std::vector<double> dropouts, bool bf16, const Tensor& is_classification, int64_t x_columns) {
  std::optional<FoldedGrads> folded;
  STD_TORCH_CHECK(rows.has_value() == among.has_value(), "rows and among must be given together");
  if (rows) folded = FoldedGrads{*rows, *among, are_all};
  return registry().add(std::make_shared<Training>(
      TrainedLookup{std::move(weights), plan, width, std::move(wanted), places, small_plan,
                    static_cast<size_t>(small_weight)},
      TrainedLayers{std::move(learned), std::move(running), std::move(plans), std::move(batch_counters),
                    std::move(dropouts), bf16, is_classification, x_columns},
      std::move(folded)));
}

void training_add_rule(int64_t number, std::vector<int64_t> at, std::vector<Tensor> states,
                       std::vector<Tensor> counters, int64_t rule) {
  registry().find(number)->add_rule({std::move(at), std::move(states), std::move(counters), rule});
}

std::tuple<Tensor, Tensor, bool> training_step(int64_t number, const Tensor& ids, std::optional<Tensor> dense,
                                               const Tensor& labels, const Tensor& factors, std::vector<int64_t> seeds,
                                               std::vector<double> numbers, std::vector<double> counts) {
  return registry().find(number)->step(ids, dense, labels, factors, seeds, numbers, counts);
}

std::vector<Tensor> training_gradients(int64_t number, std::vector<int64_t> at) {
  const std::vector<std::optional<Tensor>> all = registry().find(number)->grads();
  std::vector<Tensor> found;
  for (int64_t i : at) {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(all.size()) && all[static_cast<size_t>(i)], "parameter ", i,
                    " has no gradient");
    found.push_back(*all[static_cast<size_t>(i)]);
  }
  return found;
}

void training_free(int64_t number) { registry().remove(number); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def(
      "training_new(Tensor[] weights, Tensor plan, int width, int[] wanted, Tensor? places, Tensor? small_plan, "
      "int small_weight, Tensor? rows, Tensor? among, bool are_all, Tensor[] learned, Tensor[] running, Tensor[] "
      "plans, "
      "Tensor[] batch_counters, float[] dropouts, bool bf16, Tensor is_classification, int x_columns) "
      "-> int");
  m.def("training_add_rule(int number, int[] at, Tensor[] states, Tensor[] counters, int rule) -> ()");
  m.def(
      "training_step(int number, Tensor ids, Tensor? dense, Tensor labels, Tensor factors, int[] seeds, float[] "
      "numbers, float[] "
      "counts) -> (Tensor, Tensor, bool)");
  m.def("training_gradients(int number, int[] at) -> Tensor[]");
  m.def("training_free(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("training_new", FASTMTL_BOX(&training_new));
  m.impl("training_step", FASTMTL_BOX(&training_step));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("training_add_rule", FASTMTL_BOX(&training_add_rule));
  m.impl("training_gradients", FASTMTL_BOX(&training_gradients));
  m.impl("training_free", FASTMTL_BOX(&training_free));
}

}  // namespace fastmtl::cpu
