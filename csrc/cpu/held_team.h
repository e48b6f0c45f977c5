// Threads that are woken once for several parallel parts of one op, and stay awake between them.
//
// What runs between the parts takes microseconds, where waking a sleeping thread takes some 60 us, and a small model's
// parts 50 to 200 (docs/performance.md, "One call a batch"). As in core/phases.h nobody waits for a thread that is
// late.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "core/phases.h"
#include "cpu/tensors.h"

namespace fastmtl::cpu {

class HeldTeam {
 public:
  // The team of the op that this thread runs; null: there is none.
  static HeldTeam* current() { return mine(); }

  // f() on this thread, with so many others (where `threads` > 1) at hand for the parts in it.
  template <class F>
  static void hold(int64_t threads, const F& f) {
    if (threads <= 1) return f();
    HeldTeam team;
    std::exception_ptr error;  // which would lose its message on the way through torch
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      const Held held(team);
      try {
        f();
      } catch (...) {
        error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

  // f() on every thread that is there, this one included; returns when all are through, and throws what one threw.
  template <class F>
  void run(const F& f) {
    job_ = {[](const void* g) { (*static_cast<const F*>(g))(); }, &f};
    error_ = nullptr;
    claimed_.store(false, std::memory_order_relaxed);
    const uint64_t number = ++last_;
    open_.store(number);
    guarded();
    open_.store(0);  // who comes from now on finds nothing to do
    for (int64_t turn = 0; inside_.load() > 0; ++turn) Phases::wait(turn);
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Job {
    void (*call)(const void*);
    const void* with;
  };
  // The team is this thread's until the end of the op, however it ends.
  struct Held {
    HeldTeam& team;
    explicit Held(HeldTeam& held) : team(held) { mine() = &held; }
    ~Held() {
      mine() = nullptr;
      team.open_.store(kOver);
    }
  };
  static constexpr uint64_t kOver = UINT64_MAX;

  static HeldTeam*& mine() {
    static thread_local HeldTeam* team = nullptr;
    return team;
  }

  void help() {
    uint64_t done = 0;
    for (int64_t turn = 0;; ++turn) {
      const uint64_t open = open_.load();
      if (open == kOver) return;
      if (open == 0 || open == done) {
        Phases::wait(turn);
        continue;
      }
      turn = 0;
      inside_.fetch_add(1);
      const uint64_t still = open_.load();  // once inside, the job stays until we leave
      if (still != 0 && still != kOver && still != done) {
        done = still;
        guarded();
      }
      inside_.fetch_sub(1);
    }
  }

  // The first exception is kept.
  void guarded() {
    try {
      job_.call(job_.with);
    } catch (...) {
      if (!claimed_.exchange(true)) error_ = std::current_exception();
    }
  }

  Job job_{};
  uint64_t last_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> claimed_{false};
  alignas(64) std::atomic<uint64_t> open_{0};  // the number of the job that may be begun; 0: none
  alignas(64) std::atomic<int64_t> inside_{0};
};

}  // namespace fastmtl::cpu
