// The core's Runtime on torch: its thread pool.
#pragma once

#include <algorithm>

#include "core/phases.h"
#include "cpu/held_team.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {

// Multiply-adds for which it pays to wake a thread: some 100 us, where a sleeping one takes 60 us to come. One that is
// awake pays for itself within 3 us.
constexpr int64_t kThreadWork = int64_t{1} << 22, kAwakeWork = int64_t{1} << 17;

struct TorchRuntime {
  // f(worker) on as many threads as `work` multiply-adds in at most `tasks` tasks at a time are worth, for at most
  // `limit` phases; throws what a task throws.
  template <class F>
  void team(int64_t limit, int64_t tasks, int64_t work, const F& f) const {
    Phases phases(limit);
    const auto join = [&](int64_t, int64_t) {
      Phases::Worker worker(phases);
      f(worker);
    };
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), tasks, work / kThreadWork});
    if (HeldTeam* held = HeldTeam::current(); held && tasks > 1 && work >= kAwakeWork) {
      held->run([&] { join(0, 1); });
    } else if (threads > 1) {
      torch::stable::parallel_for(0, threads, 1, join);
    } else {
      join(0, 1);
    }
    phases.check();
  }
};

}  // namespace fastmtl::cpu
