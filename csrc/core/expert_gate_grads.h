// What expert_gate's backward reads and keeps between its phases.
#pragma once

#include <vector>

#include "core/expert_gate.h"

namespace fastmtl {

// Output gradient: pointers to each of its G or E matrices [B, H], or to the one [B, E].
struct OutputGrad {
  const float* data;
  int64_t matrix_stride, row_stride;
  const float* at(int64_t matrix, int64_t row) const { return data + matrix * matrix_stride + row * row_stride; }
};

// What is summed over the rows of one BatchNorm, tile by tile.
struct NormSums {
  int64_t columns, n_sums;
  std::vector<double> sums;            // [tiles, n_sums, columns]
  std::vector<double> mean_dy, slope;  // see TileKernels::linear_grad
  NormSums(const Tiles& tiles, int64_t n, bool learned)
      : columns(n),
        n_sums(learned ? 3 : 2),
        sums(static_cast<size_t>(tiles.count * n_sums * n)),
        mean_dy(static_cast<size_t>(n)),
        slope(static_cast<size_t>(n)) {}
  GradSums of(int64_t tile, int64_t column) {
    double* first = sums.data() + tile * n_sums * columns + column;
    return {first, first + columns, n_sums == 3 ? first + 2 * columns : nullptr};
  }
  double total(int64_t which, int64_t column, int64_t tiles) const {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += sums[(tile * n_sums + which) * columns + column];
    return sum;
  }
};

// dy, then dz, of a hidden layer.
template <class T>
struct LayerGrad {
  Scratch<T> memory;
  Grouped<T> dz;
  LayerGrad(int64_t n_rows, int64_t columns, int64_t group)
      : memory(Grouped<T>::size(n_rows, columns, group)), dz(memory.get(), n_rows, group) {}
};

}  // namespace fastmtl
