// What a packed model computes, and how it is run; inference.h packs it.
//
// Layout      a model is a list of stages over numbered matrices of a tile's rows. Matrix 0 is the looked-up row; each
//             stage appends its results. Pointers to parameters must hold while the model is packed, not longer.
// Threading, determinism, aliasing: inference.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/expert_gate.h"
#include "core/small_tables.h"

namespace fastmtl {

// Elements from a row of a tile's matrix to the next: whole cache lines, and no power of two, whose rows would all fall
// into one set of the cache.
template <class U>
int64_t stride(int64_t cols) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(U));
  const int64_t whole = round_up(std::max<int64_t>(cols, 1), kLine);
  return whole * static_cast<int64_t>(sizeof(U)) % 4096 == 0 ? whole + kLine : whole;
}

// Layer of experts and gates, with its parameters; reads `inputs`, appends one matrix a gate (an expert where there are
// no gates), or with an output layer fills the columns `logits` of the tile's logits, one an expert.
struct BankStage {
  ExpertGateLayer layer;
  ExpertGateParams params;
  std::vector<int64_t> inputs, logits;
};

// AITM's attention; qkv is [3 width, width]. Appends one matrix.
struct TransferStage {
  int64_t width, own, info;
  const float* qkv;
};

// One of the two, by `is_bank`.
struct Stage {
  bool is_bank;
  BankStage bank;
  TransferStage transfer;
};

enum OutputKind : int64_t { kLogit = 0, kProbability, kProduct, kOutputKinds };

// A column of the predictions, from the logits in columns a and b.
struct Output {
  int64_t kind, a, b;
};

struct Program {
  int64_t width;  // of the looked-up row
  int64_t n_logits;
  std::vector<Output> outputs;
  std::vector<Stage> stages;
  // Of matrix 0, which then only first layers and gates may read, in fp32; their columns are no longer looked up.
  std::vector<SmallTable> small;
};

// Writes looked-up rows [begin, end) of a tile, and for each small table which of all sums its row stands for.
struct RowSource {
  virtual ~RowSource() = default;
  virtual void fill(int64_t begin, int64_t end, float* to, int64_t ld) const = 0;
  virtual void pick(int64_t begin, int64_t end, int32_t* to, int64_t ld) const = 0;
};

class Inference {
 public:
  virtual ~Inference() = default;
  virtual int64_t width() const = 0;  // of the rows that are looked up: without small tables
  virtual const SmallTables& small() const = 0;
  virtual int64_t n_outputs() const = 0;
  virtual int64_t work() const = 0;  // multiply-adds a row
  virtual bool is_bf16() const = 0;
  virtual int64_t tile_rows() const = 0;                 // the most rows that stay in the cache together
  virtual size_t scratch_bytes(int64_t rows) const = 0;  // whole cache lines
  virtual void run(const RowSource& source, int64_t rows, float* out, std::byte* scratch) const = 0;
};

}  // namespace fastmtl
