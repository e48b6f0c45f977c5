// The work of one op on several threads that are woken once: phase after phase, each a number of tasks.
//
// Waking a sleeping thread takes some 60 us, more than most phases of a small layer. So the threads stay together for
// the whole op, take tasks as they come, and only wait for each other's last tasks. A thread that arrives late, or
// never, costs nothing but its help: nobody waits for a thread, only for tasks that somebody has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmtl {

class Phases {
 public:
  // `limit`: phases at most.
  explicit Phases(int64_t limit) : states_(new State[static_cast<size_t>(limit)]) {}

  // One thread's way through the phases. Every thread must run the same phases in the same order.
  class Worker {
   public:
    explicit Worker(Phases& shared) : shared_(shared) {}

    // f(i) once for each i in [0, count), on any of the threads; returns when all of them have returned.
    template <class F>
    void run(int64_t count, const F& f) {
      State& state = shared_.states_[next_++];
      for (int64_t i; (i = state.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
        shared_.guarded([&] { f(i); });
        state.finished.fetch_add(1, std::memory_order_release);
      }
      for (int64_t turn = 0; state.finished.load(std::memory_order_acquire) < count; ++turn) wait(turn);
    }

   private:
    Phases& shared_;
    int64_t next_ = 0;
  };

  // A moment of waiting, the turn-th in a row.
  static void wait(int64_t turn) {
    if (turn > 4096) return std::this_thread::yield();  // somebody else has the other's core
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Throws what a task has thrown; called when all threads are through.
  void check() const {
    if (failed_.load()) std::rethrow_exception(error_);
  }

 private:
  // a cache line each, so that a waiting thread does not slow down those that take tasks of the next phase
  struct alignas(64) State {
    std::atomic<int64_t> taken{0};
    alignas(64) std::atomic<int64_t> finished{0};
  };

  // The first exception is kept, and whatever follows it is left out: its tasks would read what was never written.
  template <class F>
  void guarded(const F& f) {
    if (failed_.load(std::memory_order_acquire)) return;
    try {
      f();
    } catch (...) {
      if (!claimed_.exchange(true)) {
        error_ = std::current_exception();
        failed_.store(true, std::memory_order_release);
      }
    }
  }

  std::unique_ptr<State[]> states_;
  std::atomic<bool> claimed_{false}, failed_{false};
  std::exception_ptr error_;
};

}  // namespace fastmtl
