// Ops that others are made of; each is described where it is defined.
#pragma once

#include <optional>
#include <vector>

#include "cpu/tensors.h"

namespace fastmtl::cpu {

// embedding_bag.cpp
Tensor embedding_bag_fwd(std::vector<Tensor> weights, const Tensor& ids, std::optional<Tensor> dense,
                         const Tensor& plan, int64_t width);
Tensor embedding_bag_picks(const Tensor& ids, const Tensor& plan, std::vector<int64_t> shapes);
// A gradient [rows, columns] whose rows begin `stride` numbers apart.
struct RowsOfGrad {
  const float* data;
  int64_t rows, columns, stride;
};
std::vector<Tensor> embedding_bag_grads(const RowsOfGrad& grad, const Tensor& ids, const Tensor& plan,
                                        const std::vector<int64_t>& shapes);

// expert_gate.cpp
std::vector<Tensor> chain_gradients(const Tensor& x, std::vector<Tensor> learned, std::vector<Tensor> running,
                                    std::vector<Tensor> plans, std::vector<double> dropouts, std::vector<int64_t> seeds,
                                    bool bf16, const Tensor& labels, const Tensor& is_classification,
                                    const Tensor& factors, int64_t x_columns, std::optional<Tensor> places,
                                    std::optional<Tensor> table, std::optional<Tensor> picks);

// optimizer.cpp
// What one dense step moves.
struct DenseState {
  std::vector<Tensor> params, grads, states, counters;
};
bool can_step(const DenseState& all, double number);
bool dense_step(DenseState all, int64_t rule, const std::vector<double>& numbers, double number);

}  // namespace fastmtl::cpu
