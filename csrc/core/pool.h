// Large blocks of memory, kept from one step to the next: a fresh one costs a page fault for each of its pages, which
// was a tenth of a training step.
//
// Threading   any thread may take and give. A thread that finds another at it waits for a moment and then goes to the
//             system, so that a process forked at that moment does not wait for ever.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastmtl {

class Pool {
 public:
  // Blocks below this size are left to the system, which keeps them itself.
  static constexpr size_t kLarge = size_t{1} << 20;

  // Never destroyed: tensors may outlive it otherwise.
  static Pool& global() {
    static Pool* const pool = new Pool;
    return *pool;
  }

  // At least `bytes` bytes on a cache line, uninitialised.
  void* take(size_t bytes) {
    // whole huge pages: fewer faults, and strided reads keep their translations
    const size_t size = (bytes + kHeader + kHugePage - 1) / kHugePage * kHugePage;
    if (const std::unique_lock lock = briefly(); lock) {
      auto best = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        const bool fits = block->size >= size && block->size <= size + size / 4;
        if (fits && (best == kept_.end() || block->size < best->size)) best = block;
      }
      if (best != kept_.end()) {
        void* const start = best->start;
        kept_bytes_ -= best->size;
        kept_.erase(best);
        return data_of(start);
      }
    }
    void* const start = std::aligned_alloc(kHugePage, size);
    if (start == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(start, size, MADV_HUGEPAGE);  // advice: where it is not taken, all is as before
#endif
    *static_cast<size_t*>(start) = size;
    return data_of(start);
  }

  void give(void* data) {
    void* const start = static_cast<char*>(data) - kHeader;
    const Block block{start, *static_cast<size_t*>(start)};
    const std::unique_lock lock = briefly();
    if (!lock || block.size > kMostKept) {
      std::free(start);
      return;
    }
    kept_.push_back(block);
    for (kept_bytes_ += block.size; kept_bytes_ > kMostKept; kept_.pop_front()) {  // the longest unused first
      kept_bytes_ -= kept_.front().size;
      std::free(kept_.front().start);
    }
  }

 private:
  struct Block {
    void* start;
    size_t size;
  };
  static constexpr size_t kHeader = 64, kHugePage = size_t{1} << 21;
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kMostKept = 0;  // a block that is kept would hide a use after it was given
#else
  static constexpr size_t kMostKept = size_t{512} << 20;
#endif

  // The lock, if it is to be had within about 10 us: threads of one op come here at the same time.
  std::unique_lock<std::mutex> briefly() {
    std::unique_lock lock{mutex_, std::try_to_lock};
    for (int turn = 0; !lock && turn < 1000; ++turn) lock.try_lock();
    return lock;
  }

  static void* data_of(void* start) { return static_cast<char*>(start) + kHeader; }

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t kept_bytes_ = 0;
};

}  // namespace fastmtl
