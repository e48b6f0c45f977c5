// The core's Runtime on torch: its thread pool and its matrix product.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>

#include "core/kernels.h"
#include "core/phases.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {

// While it lives, torch's matrix products run on the calling thread alone. torch lets MKL use threads of its own even
// inside a parallel region, and then MKL sums in an order that depends on their number. Where torch has another library
// than MKL, this does nothing.
class SequentialProducts {
 public:
  SequentialProducts() : before_(setter() ? setter()(1) : 0) {}
  ~SequentialProducts() {
    if (setter()) setter()(before_);
  }
  SequentialProducts(const SequentialProducts&) = delete;
  SequentialProducts& operator=(const SequentialProducts&) = delete;

 private:
  using Setter = int (*)(int);
  static Setter setter() {
    static const Setter found = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return found;
  }
  int before_;
};

// Multiply-adds for which it pays to wake a thread: some 100 us, where a sleeping one takes 60 us to come.
constexpr int64_t kThreadWork = int64_t{1} << 22;

struct TorchRuntime {
  // f(worker) on as many threads as `work` multiply-adds in at most `tasks` tasks at a time are worth, for at most
  // `limit` phases; throws what a task throws.
  template <class F>
  void team(int64_t limit, int64_t tasks, int64_t work, const F& f) const {
    Phases phases(limit);
    const auto join = [&](int64_t, int64_t) {
      const SequentialProducts here;
      Phases::Worker worker(phases);
      f(worker);
    };
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), tasks, work / kThreadWork});
    if (threads > 1) {
      torch::stable::parallel_for(0, threads, 1, join);
    } else {
      join(0, 1);
    }
    phases.check();
  }

  // c [m, n] = a [m, k] b [k, n], plus c where it accumulates; a transposed operand is given as its [k, m] or [n, k].
  //
  // By the C function behind aten::mm.out, not by the dispatcher: it may be called from a thread of a team (where it
  // stays on that thread), and costs a third.
  void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t ld_a, bool transpose_a, const float* b,
            int64_t ld_b, bool transpose_b, float* c, int64_t ld_c, bool accumulate) const {
    if (m * n * k <= kSmallProduct) {
      best_kernels().small_gemm(m, n, k, a, ld_a, transpose_a, b, ld_b, transpose_b, c, ld_c, accumulate);
      return;
    }
    const Tensor left = matrix(a, m, k, ld_a, transpose_a), right = matrix(b, k, n, ld_b, transpose_b);
    const Tensor result = matrix(c, m, n, ld_c, false);
    if (accumulate) {
      done(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
    } else {
      done(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
    }
  }

 private:
  // torch's own macro for this is not in the headers of 2.11
  static void done(AOTITorchError code) { STD_TORCH_CHECK(code == 0, "a product failed in torch"); }
  static Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t ld, bool transposed) {
    const std::array<int64_t, 2> sizes{rows, columns};
    const std::array<int64_t, 2> strides = transposed ? std::array<int64_t, 2>{1, ld} : std::array<int64_t, 2>{ld, 1};
    return torch::stable::from_blob(const_cast<float*>(data), {sizes.data(), 2}, {strides.data(), 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
  }
};

}  // namespace fastmtl::cpu
