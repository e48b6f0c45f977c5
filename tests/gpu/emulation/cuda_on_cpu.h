// CUDA's execution model on a CPU, enough for csrc/cuda/*.cuh: a thread of the operating system for each thread
// of a block, the blocks one after the other. Barriers and shuffles wait for the threads they name, so that a kernel
// that synchronises too little races here too (-fsanitize=thread finds it), and one that reads outside its arrays is
// found by -fsanitize=address.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define __forceinline__ inline

struct Place {
  unsigned x;
};
inline thread_local Place threadIdx;
inline Place blockIdx, blockDim, gridDim;

namespace emulated {

struct Group {
  explicit Group(int members) : barrier(members) {}
  std::barrier<> barrier;
  float values[32];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {}
  std::barrier<> barrier;
  std::mutex guard;
  std::map<std::pair<unsigned, unsigned>, std::unique_ptr<Group>> groups;  // of a warp, by mask

  Group& group(unsigned mask) {
    const std::lock_guard<std::mutex> lock(guard);
    auto& found = groups[{threadIdx.x / 32, mask}];
    if (!found) found = std::make_unique<Group>(__builtin_popcount(mask));
    return *found;
  }
};
inline Block* block = nullptr;

template <class Kernel, class... Args>
void run(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
  Block shared(threads);
  block = &shared;
  blockDim.x = threads;
  gridDim.x = blocks;
  std::barrier between(threads, []() noexcept { ++blockIdx.x; });
  blockIdx.x = 0;
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      threadIdx.x = i;
      for (unsigned b = 0; b < blocks; ++b) {
        kernel(args...);
        between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace emulated

inline void __syncthreads() { emulated::block->barrier.arrive_and_wait(); }
inline void __syncwarp(unsigned mask) { emulated::block->group(mask).barrier.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned mask, float x, int offset) {
  emulated::Group& group = emulated::block->group(mask);
  const unsigned lane = threadIdx.x % 32;
  group.values[lane] = x;
  group.barrier.arrive_and_wait();
  const float found = group.values[lane ^ static_cast<unsigned>(offset)];
  group.barrier.arrive_and_wait();
  return found;
}
inline int32_t atomicAdd(int32_t* at, int32_t more) { return __atomic_fetch_add(at, more, __ATOMIC_RELAXED); }
