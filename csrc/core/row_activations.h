// Kernels over tiles whose activation looks at a whole row of an expert: softmax, and dice as torch-rechub has it
// (h = y * (p + (1 - p) * alpha), p = sigmoid(c / norm), c = y - mean of the row, norm = sqrt of the sum of c^2 +
// epsilon).
//
// Compiled once for each instruction set, see simd.h; contracts in kernels.h. Row by row, expert by expert; the sums
// over the rows go to double at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/elementwise.h"

namespace fastmtl::FASTMTL_ISA {

struct SoftmaxRow {
  static constexpr bool kLearned = false, kRow = true;

  static void forward(const float* y, const float*, int64_t width, float* h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < width; ++j) top = std::max(top, y[j]);
    F32 total{};
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const F32 e = exp(load(y + c, n) - top);
      store(h + c, e, n);
      total += load(h + c, n);  // again, so that the lanes behind the row count nothing
    });
    const float whole = sum(total);
    for_columns(width,
                [&](int64_t c, auto n) __attribute__((always_inline)) { store(h + c, load(h + c, n) / whole, n); });
  }

  // h is forward's result; dy may be dh.
  static void backward(const float*, const float* h, const float* dh, const float*, int64_t width, float* dy, double*) {
    // about the gradient of the largest: a row that is almost one-hot leaves nothing else
    const float about = dh[std::max_element(h, h + width) - h];
    F32 dots{};
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      dots += load(h + c, n) * (load(dh + c, n) - about);  // h is zero behind the row
    });
    const float dot = sum(dots);
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      store(dy + c, load(h + c, n) * (load(dh + c, n) - about - dot), n);
    });
  }
};

struct DiceRow {
  static constexpr bool kLearned = true, kRow = true;

  struct Moments {
    float mean, norm;
  };
  static Moments moments(const float* y, int64_t width) {
    F32 total{};
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) { total += load(y + c, n); });
    const float mean = sum(total) / static_cast<float>(width);
    F32 squares{};
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      if (n >= kLanes) {
        const F32 d = load(y + c) - mean;
        squares += d * d;
      } else {
        for (int64_t i = 0; i < n; ++i) squares[i] += (y[c + i] - mean) * (y[c + i] - mean);
      }
    });
    return {mean, std::sqrt(sum(squares) + static_cast<float>(width) * kDiceEpsilon)};
  }

  static void forward(const float* y, const float* alpha, int64_t width, float* h) {
    const Moments m = moments(y, width);
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      const F32 value = load(y + c, n), a = load(alpha + c, n);
      const F32 p = sigmoid((value - m.mean) / m.norm);
      store(h + c, value * (p + (1.0f - p) * a), n);
    });
  }

  static void backward(const float* y, const float*, const float* dh, const float* alpha, int64_t width, float* dy,
                       double* dalpha) {
    const Moments m = moments(y, width);
    // with u = c / norm and du its gradient: dc = du / norm - c <du, c> / norm^3, and c loses its mean
    F32 sum_du{}, sum_du_c{}, sum_c{};
    const auto parts = [&](int64_t c, auto n, F32& direct, F32& du, F32& centred) __attribute__((always_inline)) {
      const F32 value = load(y + c, n), a = load(alpha + c, n), d = load(dh + c, n);
      centred = value - m.mean;
      const F32 p = sigmoid(centred / m.norm);
      direct = d * (p + (1.0f - p) * a);
      du = d * value * (1.0f - a) * p * (1.0f - p);  // zero behind the row, as d is
      return d * value * (1.0f - p);
    };
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      F32 direct, du, centred;
      add_to(dalpha + c, wide(parts(c, n, direct, du, centred)), n);
      sum_du += du;
      sum_du_c += du * centred;
      if (n >= kLanes) {
        sum_c += centred;
      } else {
        for (int64_t i = 0; i < n; ++i) sum_c[i] += centred[i];
      }
    });
    const float inverse = 1.0f / m.norm;
    const float pull = sum(sum_du_c) * inverse * inverse * inverse;
    const float mean_dc = (sum(sum_du) * inverse - sum(sum_c) * pull) / static_cast<float>(width);
    for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) {
      F32 direct, du, centred;
      parts(c, n, direct, du, centred);
      store(dy + c, direct + (du * inverse - centred * pull - mean_dc), n);
    });
  }
};

// y of one expert's row into `y`.
template <class T>
FASTMTL_INLINE void normalise_row(const Tile<T>& t, int64_t r, int64_t first, float* y) {
  for_columns(t.width, [&](int64_t c, auto n) __attribute__((always_inline)) {
    const ColumnConstants k = constants(t, first + c, n);
    store(y + c, (load(t.z + r * t.ld + first + c, n) - k.mean) * k.scale + k.shift, n);
  });
}

template <class T>
FASTMTL_INLINE void drop_row(const Tile<T>& t, int64_t r, int64_t first, float* values) {
  if (!t.dropout.on) return;
  const uint64_t key = row_key(t.dropout.key, t.first_row + r);
  for_columns(t.width, [&](int64_t c, auto n) __attribute__((always_inline)) {
    store(values + c, load(values + c, n) * dropout_mask(t.dropout, key, t.first_column + first + c), n);
  });
}

template <class T>
FASTMTL_INLINE void store_row(const float* values, int64_t width, T* to) {
  for_columns(width, [&](int64_t c, auto n) __attribute__((always_inline)) { store(to + c, load(values + c, n), n); });
}

template <class Act, class T, class H>
void hidden_rows(const Tile<T>& t, H* h, int64_t ld_h) {
  std::vector<float> y(static_cast<size_t>(t.width)), value(y.size());
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t first = 0; first < t.cols; first += t.width) {
      normalise_row(t, r, first, y.data());
      Act::forward(y.data(), t.alpha ? t.alpha + first : nullptr, t.width, value.data());
      drop_row(t, r, first, value.data());
      store_row(value.data(), t.width, h + r * ld_h + first);
    }
  }
}

template <class Act, class T>
void hidden_grad_rows(const Tile<T>& t, const float* dh, int64_t ld_dh, T* dy, int64_t ld_dy, const GradSums& sums) {
  const size_t width = static_cast<size_t>(t.width);
  std::vector<float> y(width), value(width), masked(width), grad(width);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t first = 0; first < t.cols; first += t.width) {
      const float* alpha = t.alpha ? t.alpha + first : nullptr;
      normalise_row(t, r, first, y.data());
      std::copy_n(dh + r * ld_dh + first, width, masked.data());
      drop_row(t, r, first, masked.data());
      Act::forward(y.data(), alpha, t.width, value.data());
      Act::backward(y.data(), value.data(), masked.data(), alpha, t.width, grad.data(),
                    Act::kLearned ? sums.dalpha + first : nullptr);
      for_columns(t.width, [&](int64_t c, auto n) __attribute__((always_inline)) {
        const ColumnConstants k = constants(t, first + c, n);
        const F32 g = load(grad.data() + c, n);
        add_to(sums.dy + first + c, wide(g), n);
        add_to(sums.dy_centred + first + c, wide(g) * wide(load(t.z + r * t.ld + first + c, n) - k.mean), n);
      });
      store_row(grad.data(), t.width, dy + r * ld_dy + first);
    }
  }
}

}  // namespace fastmtl::FASTMTL_ISA
