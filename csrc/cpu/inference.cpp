// Inference on torch tensors: models are packed and kept under a number, and run on the columns of a batch. What the
// ops mean is in fastmtl/backends/native_inference.py.
#include "core/inference.h"

#include <atomic>
#include <limits>
#include <optional>

#include "cpu/embedding_bag_args.h"
#include "cpu/expert_gate_args.h"
#include "cpu/registry.h"

namespace fastmtl::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------- packing

class Numbers {
 public:
  explicit Numbers(const Tensor& plan) {
    check_cpu(plan, ScalarType::Long, 1, "plan");
    STD_TORCH_CHECK(plan.is_contiguous(), "plan must be contiguous");
    at_ = plan.const_data_ptr<int64_t>();
    end_ = at_ + plan.size(0);
  }
  const int64_t* take(int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= end_ - at_, "plan is too short");
    const int64_t* from = at_;
    at_ += n;
    return from;
  }
  int64_t next(int64_t limit, const char* what) {
    const int64_t value = *take(1);
    STD_TORCH_CHECK(value >= 0 && value < limit, "plan: no ", what, " ", value);
    return value;
  }
  void done() const { STD_TORCH_CHECK(at_ == end_, "plan is too long"); }

 private:
  const int64_t *at_, *end_;
};

std::vector<Tensor> cut(const std::vector<Tensor>& list, size_t& at, size_t n, const char* name) {
  STD_TORCH_CHECK(n <= list.size() - at, name, " has only ", list.size(), " tensors");
  at += n;
  return {list.begin() + static_cast<std::ptrdiff_t>(at - n), list.begin() + static_cast<std::ptrdiff_t>(at)};
}

constexpr int64_t kMost = int64_t{1} << 20;  // of anything that is counted

// The plan (int64): width of a row, logits, outputs, stages, small tables | for each output its kind and two logits |
// for each small table its column, width and rows | for each stage
//   1, the length of a layer's plan (see checked_layer), that plan, the matrices it reads [N], with an output layer the
//     logits of its experts [E]; or
//   0, width, the matrices `own` and `info`.
// `learned` holds the small tables [rows, width], then it and `running` the parameters of all stages in order; `held`
// keeps alive what the program points to.
Program checked_program(Numbers& numbers, const std::vector<Tensor>& learned, const std::vector<Tensor>& running,
                        std::vector<std::vector<Tensor>>& held) {
  Program program;
  program.width = numbers.next(kMost, "row of width");
  program.n_logits = numbers.next(kMost, "number of logits");
  const int64_t n_outputs = numbers.next(kMost, "number of outputs"),
                n_stages = numbers.next(kMost, "number of stages"), n_small = numbers.next(kMost, "small tables");
  for (int64_t t = 0; t < n_outputs; ++t) {
    const int64_t kind = numbers.next(kOutputKinds, "kind of output"), a = numbers.next(program.n_logits, "logit");
    program.outputs.push_back({kind, a, numbers.next(program.n_logits, "logit")});
  }
  std::vector<int64_t> widths{program.width};
  const auto matrix = [&](int64_t width) {
    const int64_t number = numbers.next(static_cast<int64_t>(widths.size()), "matrix");
    STD_TORCH_CHECK(widths[number] == width, "plan: matrix ", number, " has ", widths[number], " columns, not ", width);
    return number;
  };
  size_t next_learned = 0, next_running = 0;
  int64_t free = 0;
  for (int64_t i = 0; i < n_small; ++i) {
    SmallTable table{numbers.next(kMost, "column"), numbers.next(kMost, "width"), numbers.next(kMost, "rows"), nullptr};
    STD_TORCH_CHECK(table.dim > 0 && table.column >= free && table.column + table.dim <= program.width,
                    "plan: small tables must have columns of their own");
    free = table.column + table.dim;
    held.push_back(cut(learned, next_learned, 1, "learned"));
    table.values = Reader(held.back(), "learned").take(table.rows * table.dim);
    program.small.push_back(table);
  }
  std::vector<bool> filled(static_cast<size_t>(program.n_logits), false);
  for (int64_t s = 0; s < n_stages; ++s) {
    Stage stage{};
    stage.is_bank = numbers.next(2, "kind of stage") == 1;
    if (!stage.is_bank) {
      TransferStage& transfer = stage.transfer;
      transfer.width = numbers.next(kMost, "width");
      transfer.own = matrix(transfer.width);
      transfer.info = matrix(transfer.width);
      STD_TORCH_CHECK(n_small == 0 || (transfer.own > 0 && transfer.info > 0), "plan: attention reads small tables");
      held.push_back(cut(learned, next_learned, 1, "learned"));
      transfer.qkv = Reader(held.back(), "learned").take(3 * transfer.width * transfer.width);
      widths.push_back(transfer.width);
      program.stages.push_back(std::move(stage));
      continue;
    }
    BankStage& bank = stage.bank;
    const int64_t length = numbers.next(kMost, "layer of length");
    const int64_t* layer = numbers.take(length);
    bank.layer = checked_layer(layer, layer + length);
    const size_t depth = static_cast<size_t>(bank.layer.depth());
    const bool gates = !bank.layer.gates.empty();
    held.push_back(cut(learned, next_learned,
                       (learns(bank.layer) ? 5 : 4) * depth + (bank.layer.output_layer ? 2 : 0) + (gates ? 4 : 0),
                       "learned"));
    bank.params = read_learned(bank.layer, held.back());
    held.push_back(cut(running, next_running, 2 * depth + (gates ? 2 : 0), "running"));
    read_running(bank.layer, held.back(), bank.params);
    for (int64_t n = 0; n < bank.layer.n_inputs; ++n) bank.inputs.push_back(matrix(bank.layer.in_features));
    for (int64_t input : bank.inputs) {
      STD_TORCH_CHECK(input > 0 || n_small == 0 || depth > 0, "plan: small tables, and no hidden layer reads them");
    }
    if (bank.layer.output_layer) {
      for (int64_t e = 0; e < bank.layer.n_experts; ++e) {
        bank.logits.push_back(numbers.next(program.n_logits, "logit"));
        filled[static_cast<size_t>(bank.logits.back())] = true;
      }
    } else {
      const size_t results = gates ? bank.layer.gates.size() : static_cast<size_t>(bank.layer.n_experts);
      widths.insert(widths.end(), results, bank.layer.dims[depth - 1]);
    }
    program.stages.push_back(std::move(stage));
  }
  for (int64_t i = 0; i < program.n_logits; ++i) STD_TORCH_CHECK(filled[i], "plan: nothing computes logit ", i);
  STD_TORCH_CHECK(next_learned == learned.size() && next_running == running.size(), "there are tensors to spare");
  numbers.done();
  return program;
}

Registry<const Inference>& registry() { return Registry<const Inference>::global(); }

int64_t inference_new(const Tensor& plan, std::vector<Tensor> learned, std::vector<Tensor> running, bool bf16) {
  Numbers numbers(plan);
  std::vector<std::vector<Tensor>> held;
  const Program program = checked_program(numbers, learned, running, held);
  if (bf16) return registry().add(std::make_shared<PackedInference<Bf16>>(program));
  return registry().add(std::make_shared<PackedInference<float>>(program));
}

void inference_free(int64_t model) { registry().remove(model); }

// ---------------------------------------------------------------------------------------------------- running

// The columns of one tensor [B] or [B, L].
struct Block {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType dtype;

  explicit Block(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cpu() && (tensor.dim() == 1 || tensor.dim() == 2),
                    "columns must be [B] or [B, L] on the CPU");
    data = tensor.data_ptr();
    rows = tensor.size(0);
    columns = tensor.dim() == 2 ? tensor.size(1) : 1;
    row_stride = tensor.stride(0);
    column_stride = tensor.dim() == 2 ? tensor.stride(1) : 0;
    dtype = tensor.scalar_type();
  }

  // Copies rows [begin, end) to `to`, as `From` tells them.
  template <class From, class To>
  void copy(int64_t begin, int64_t end, To* to, int64_t ld) const {
    const From* from = static_cast<const From*>(data);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t c = 0; c < columns; ++c) {
        to[(b - begin) * ld + c] = static_cast<To>(from[b * row_stride + c * column_stride]);
      }
    }
  }
};

class Blocks {
 public:
  Blocks(const std::vector<Tensor>& tensors, const char* name, bool integers) {
    for (const Tensor& tensor : tensors) {
      const Block block(tensor);
      const bool fits = integers ? block.dtype == ScalarType::Long || block.dtype == ScalarType::Int
                                 : block.dtype == ScalarType::Float || block.dtype == ScalarType::Double;
      STD_TORCH_CHECK(fits, name, " have the wrong dtype");
      STD_TORCH_CHECK(blocks_.empty() || block.rows == blocks_[0].rows, name, " differ in their rows");
      blocks_.push_back(block);
      columns_ += block.columns;
    }
  }
  int64_t columns() const { return columns_; }
  bool empty() const { return blocks_.empty(); }
  int64_t rows() const { return blocks_[0].rows; }
  const std::vector<Block>& all() const { return blocks_; }

 private:
  std::vector<Block> blocks_;
  int64_t columns_ = 0;
};

// A batch: what it looks up, and where.
struct Lookup {
  std::vector<const float*> tables;
  const Bag* bags;
  int64_t n_bags;
  Blocks ids, dense;
  const Bag* small;  // one bag for each small table of the model
};

// The rows of one tile, from `first` on.
class Lookups final : public RowSource {
 public:
  Lookups(const Lookup& lookup, const Inference& model, int64_t first)
      : lookup_(lookup), small_(model.small()), width_(model.width()), first_(first) {}

  void fill(int64_t begin, int64_t end, float* to, int64_t ld) const override {
    begin += first_;
    end += first_;
    const std::vector<Block>& blocks = lookup_.ids.all();
    if (blocks.size() == 1 && blocks[0].columns > 1 && blocks[0].dtype == ScalarType::Long) {
      gather<int64_t>(blocks[0], begin, end, to, ld);
    } else if (blocks.size() == 1 && blocks[0].columns > 1) {
      gather<int32_t>(blocks[0], begin, end, to, ld);
    } else if (!blocks.empty()) {
      const int64_t width = lookup_.ids.columns();
      ids_.resize(static_cast<size_t>((end - begin) * width));
      int64_t column = 0;
      for (const Block& block : blocks) {
        if (block.dtype == ScalarType::Long) {
          block.copy<int64_t>(begin, end, ids_.data() + column, width);
        } else {
          block.copy<int32_t>(begin, end, ids_.data() + column, width);
        }
        column += block.columns;
      }
      gather(Ids<int64_t>{ids_.data(), width, 1}, begin, end, to, ld);
    }
    copy_dense(begin, end, to, ld);
  }

  void pick(int64_t begin, int64_t end, int32_t* to, int64_t ld) const override {
    for (int64_t t = 0; t < small_.count(); ++t) {
      const Bag& bag = lookup_.small[t];
      int64_t column = bag.column;
      const Block* block = lookup_.ids.all().data();
      for (; column >= block->columns; ++block) column -= block->columns;
      if (block->dtype == ScalarType::Long) {
        pick_from<int64_t>(*block, bag, t, column, begin, end, to + t, ld);
      } else {
        pick_from<int32_t>(*block, bag, t, column, begin, end, to + t, ld);
      }
    }
  }

  const BadId& bad() const { return bad_; }
  bool all_finite() const { return all_finite_; }

 private:
  template <class Id>
  void pick_from(const Block& block, const Bag& bag, int64_t t, int64_t column, int64_t begin, int64_t end, int32_t* to,
                 int64_t ld) const {
    const Id* ids = static_cast<const Id*>(block.data) + column * block.column_stride;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t id = static_cast<int64_t>(ids[(first_ + b) * block.row_stride]), row = resolve(bag, id);
      if (row == kRefused) bad_.note({t, first_ + b, bag.column, id});
      to[(b - begin) * ld] = static_cast<int32_t>(row >= 0 ? small_.first_row(t) + row : small_.zero_row());
    }
  }
  template <class Id>
  void gather(const Block& block, int64_t begin, int64_t end, float* to, int64_t ld) const {
    const Id* data = static_cast<const Id*>(block.data) + begin * block.row_stride;
    gather(Ids<Id>{data, block.row_stride, block.column_stride}, begin, end, to, ld);
  }
  template <class Id>
  void gather(const Ids<Id>& ids, int64_t begin, int64_t end, float* to, int64_t ld) const {
    BadId bad;
    embedding_bag_fwd(lookup_.tables.data(), ids, lookup_.bags, lookup_.n_bags, 0, end - begin, to, ld, bad);
    if (bad.bag < 0) return;
    bad.row += begin;
    bad_.note(bad);
  }
  void copy_dense(int64_t begin, int64_t end, float* to, int64_t ld) const {
    int64_t column = width_ - lookup_.dense.columns();
    for (const Block& block : lookup_.dense.all()) {
      if (block.dtype == ScalarType::Float) {
        block.copy<float>(begin, end, to + column, ld);
      } else {
        block.copy<double>(begin, end, to + column, ld);
      }
      column += block.columns;
    }
    for (int64_t b = 0; b < end - begin; ++b) {
      for (int64_t c = width_ - lookup_.dense.columns(); c < width_; ++c) all_finite_ &= std::isfinite(to[b * ld + c]);
    }
  }

  const Lookup& lookup_;
  const SmallTables& small_;
  const int64_t width_, first_;
  mutable BadId bad_;
  mutable bool all_finite_ = true;
  mutable std::vector<int64_t> ids_;
};

// Kept by each thread from call to call: fresh memory would cost a page fault for every 4 KiB.
std::byte* scratch_of(size_t bytes) {
  struct Kept {
    std::byte* data = nullptr;
    size_t bytes = 0;
    ~Kept() { ::operator delete(data, std::align_val_t{64}); }
  };
  static thread_local Kept kept;
  if (kept.bytes < bytes) {
    ::operator delete(kept.data, std::align_val_t{64});
    kept = {};
    kept.data = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}));
    kept.bytes = bytes;
  }
  return kept.data;
}

// Threads that are worth waking.
int64_t threads_for(const Inference& model, int64_t n_rows, int64_t lookups) {
  constexpr int64_t kThreadWork = int64_t{1} << 25;  // multiply-adds in fp32: 250 us, where waking a thread takes 70
  constexpr int64_t kLookup = 1 << 10;               // what a row of a table costs that is in no cache
  const int64_t row = model.work() / (model.is_bf16() ? 6 : 1) + kLookup * lookups;
  return std::clamp<int64_t>(n_rows * row / kThreadWork, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
}

// Rows of a tile: at most as many as stay in the cache, and equal shares for the threads.
int64_t rows_of_a_tile(const Inference& model, int64_t n_rows, int64_t threads) {
  const int64_t tiles = round_up((n_rows + model.tile_rows() - 1) / model.tile_rows(), threads);
  return round_up((n_rows + tiles - 1) / tiles, 16);
}

// `plan` has the bags that are looked up, `small` (none: the model has none) one for each small table. A message that
// starts with "bad id" or "bad dense" is how refused input reaches Python.
Tensor inference_run(int64_t number, std::vector<Tensor> tables, std::vector<Tensor> ids, std::vector<Tensor> dense,
                     const Tensor& plan, std::optional<Tensor> small) {
  const std::shared_ptr<const Inference> model = registry().find(number);
  Lookup lookup{{}, nullptr, 0, Blocks(ids, "ids", true), Blocks(dense, "dense columns", false), nullptr};
  std::vector<int64_t> rows, dims;
  for (Tensor& table : tables) {
    check_cpu(table, ScalarType::Float, 2, "table");
    if (!table.is_contiguous()) table = torch::stable::contiguous(table);
    rows.push_back(table.size(0));
    dims.push_back(table.size(1));
    lookup.tables.push_back(table.const_data_ptr<float>());
  }
  const int64_t width = model->width();
  STD_TORCH_CHECK(!lookup.ids.empty() || !lookup.dense.empty(), "there are no columns");
  STD_TORCH_CHECK(lookup.ids.empty() || lookup.dense.empty() || lookup.ids.rows() == lookup.dense.rows(),
                  "ids and dense columns differ in their rows");
  STD_TORCH_CHECK(lookup.dense.columns() <= width, "there are too many dense columns");
  lookup.bags = checked_bags(plan, rows, dims, lookup.ids.columns(), width - lookup.dense.columns());
  lookup.n_bags = plan.size(0);
  int64_t covered = lookup.dense.columns(), id_columns = 0;
  for (int64_t f = 0; f < lookup.n_bags; ++f) {
    id_columns += lookup.bags[f].length;
    covered += lookup.bags[f].dim * (lookup.bags[f].pooling == kConcat ? lookup.bags[f].length : 1);
  }
  const int64_t n_small = small ? small->size(0) : 0;
  STD_TORCH_CHECK(n_small == model->small().count(), "the model has ", model->small().count(), " small tables, not ",
                  n_small);
  if (n_small > 0) {
    lookup.small = checked_bags(*small, rows, dims, lookup.ids.columns(), std::numeric_limits<int64_t>::max() / 2);
    for (int64_t t = 0; t < n_small; ++t) {
      STD_TORCH_CHECK(lookup.small[t].length == 1 && lookup.small[t].vocab == model->small().rows_of(t), "bag ", t,
                      " does not read its small table");
    }
    id_columns += n_small;
  }
  STD_TORCH_CHECK(id_columns == lookup.ids.columns(), "there are ", lookup.ids.columns(), " id columns, not ",
                  id_columns);
  STD_TORCH_CHECK(covered == width, "the columns fill ", covered, " columns of a row, the model reads ", width);

  const int64_t n_rows = lookup.ids.empty() ? lookup.dense.rows() : lookup.ids.rows();
  Tensor result = empty_f32({n_rows, model->n_outputs()});
  if (n_rows == 0) return result;
  float* out = result.mutable_data_ptr<float>();
  const int64_t threads = threads_for(*model, n_rows, lookup.ids.columns());
  const int64_t height = rows_of_a_tile(*model, n_rows, threads);
  BadId bad;
  bool all_finite = true;
  std::mutex guard;
  const int64_t tiles = (n_rows + height - 1) / height;
  std::atomic<int64_t> next{0};
  // each thread takes tile after tile: one that comes late, on a busy machine, leaves them to the others
  const auto run_tiles = [&](int64_t, int64_t) {
    for (int64_t tile = next++; tile < tiles; tile = next++) {
      const int64_t first = tile * height, stop = std::min(n_rows, first + height);
      const Lookups source(lookup, *model, first);
      model->run(source, stop - first, out + first * model->n_outputs(),
                 scratch_of(model->scratch_bytes(stop - first)));
      if (source.bad().bag >= 0 || !source.all_finite()) {
        const std::lock_guard<std::mutex> lock(guard);
        bad.note(source.bad());
        all_finite &= source.all_finite();
      }
    }
  };
  if (threads == 1) {
    run_tiles(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, run_tiles);
  }
  STD_TORCH_CHECK(bad.bag < 0, "bad id ", bad.id, " in row ", bad.row, ", bag ", bad.bag);
  STD_TORCH_CHECK(all_finite, "bad dense value");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def("inference_new(Tensor plan, Tensor[] learned, Tensor[] running, bool bf16) -> int");
  m.def("inference_free(int model) -> ()");
  m.def(
      "inference_run(int model, Tensor[] tables, Tensor[] ids, Tensor[] dense, Tensor plan, "
      "Tensor? small=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("inference_new", FASTMTL_BOX(&inference_new));
  m.impl("inference_run", FASTMTL_BOX(&inference_run));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("inference_free", FASTMTL_BOX(&inference_free));
}

}  // namespace fastmtl::cpu
