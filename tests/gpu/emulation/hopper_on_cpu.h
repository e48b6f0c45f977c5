// What csrc/cuda/hopper.cuh has, on a CPU, by the documents of PTX: descriptors are decoded, pieces of 16 bytes found
// where the swizzle puts them, fragments spread over a warpgroup's registers. What is asynchronous there happens as
// late as it may here: products when they are waited for, with what registers and shared memory hold by then; copies of
// threads likewise.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>

#include "cuda_on_cpu.h"

#define __grid_constant__

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

constexpr int kSharedBytes = 227 * 1024;
alignas(1024) inline unsigned char memory[kSharedBytes];

inline unsigned char* shared(uint32_t at) {
  if (at >= kSharedBytes) std::abort();
  return memory + at;
}

struct Barrier {
  uint32_t count = 0, missing = 0, phase = 0;
  int64_t bytes = 0;
};
inline std::mutex guard;
inline std::condition_variable changed;
inline std::map<uint32_t, Barrier> barriers;
inline std::map<int, std::unique_ptr<std::barrier<>>> named;

inline void count(uint32_t at, uint32_t arrivals, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  Barrier& barrier = barriers.at(at);
  if (arrivals > barrier.missing) std::abort();
  barrier.missing -= arrivals;
  barrier.bytes += bytes;
  if (barrier.missing == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.missing = barrier.count;
    changed.notify_all();
  }
}

inline std::barrier<>& barrier_of(int number, int threads) {
  const std::lock_guard<std::mutex> lock(guard);
  auto& found = named[number];
  if (!found) found = std::make_unique<std::barrier<>>(threads);
  return *found;
}

using Work = std::function<void()>;
inline thread_local std::deque<std::vector<Work>> groups(1);  // the last one is not committed yet
inline thread_local std::deque<std::vector<Work>> copies(1);  // likewise

inline float number_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Element k of row r of what a descriptor describes.
inline float element(uint64_t descriptor, int r, int k) {
  const uint64_t layout = descriptor >> 62;
  if (layout != 1 && layout != 2) std::abort();
  const uint32_t pitch = layout == 1 ? 128 : 64, eight = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  uint32_t at = (static_cast<uint32_t>(descriptor & 0x3FFF) << 4) + static_cast<uint32_t>(r) / 8 * eight +
                static_cast<uint32_t>(r) % 8 * pitch + 2 * static_cast<uint32_t>(k);
  at ^= (at >> 7 & (layout == 1 ? 7 : 3)) << 4;
  uint16_t bits;
  std::memcpy(&bits, shared(at), 2);
  return number_of(bits);
}

// Element k of column c of what descriptor_turned describes.
inline float element_turned(uint64_t descriptor, int c, int k) {
  if (descriptor >> 62 != 1) std::abort();
  const auto bytes = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3FFF) << 4; };
  uint32_t at = bytes(0) + static_cast<uint32_t>(c / 64) * bytes(16) + static_cast<uint32_t>(k / 8) * bytes(32) +
                static_cast<uint32_t>(k % 8) * 128 + static_cast<uint32_t>(c % 64) * 2;
  at ^= (at >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, shared(at), 2);
  return number_of(bits);
}

inline thread_local float a_rows[2][16];  // this thread's two rows of A

template <bool FIRST, int N>
void multiply_rows(float* d, uint64_t b, float (*of)(uint64_t, int, int) = element) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int j = 0; j < N / 4; ++j) {
    for (int column = 0; column < 2; ++column) {
      float of_b[16];
      for (int k = 0; k < 16; ++k) of_b[k] = of(b, 8 * j + 2 * (lane % 4) + column, k);
      for (int row = 0; row < 2; ++row) {
        float sum = FIRST ? 0.0f : d[4 * j + 2 * row + column];
        for (int k = 0; k < 16; ++k) sum += a_rows[row][k] * of_b[k];
        d[4 * j + 2 * row + column] = sum;
      }
    }
  }
}

inline uint32_t exchanged[32][32][4];  // by warp and lane

// A in the registers of a warp.
inline void gather(const uint32_t* a) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  std::memcpy(exchanged[warp][lane], a, 16);
  __syncwarp(0xFFFFFFFFu);
  for (unsigned other = 0; other < 4; ++other) {
    const uint32_t* theirs = exchanged[warp][lane / 4 * 4 + other];
    for (unsigned i = 0; i < 8; ++i) {
      const uint32_t pair = theirs[i / 2];
      a_rows[i / 2 % 2][i / 4 * 8 + 2 * other + i % 2] =
          number_of(static_cast<uint16_t>(i % 2 == 0 ? pair & 0xFFFF : pair >> 16));
    }
  }
  __syncwarp(0xFFFFFFFFu);
}

// Between two launches.
inline void forget() {
  barriers.clear(), named.clear();
  std::memset(memory, 0xFF, kSharedBytes);  // NaN
}

}  // namespace emulated

namespace fastmtl::cuda {

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulated::memory);
}
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  const std::lock_guard<std::mutex> lock(emulated::guard);
  emulated::barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barriers_made() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulated::count(barrier, 1, bytes); }
inline void barrier_arrive(uint32_t barrier) { emulated::count(barrier, 1, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  std::unique_lock<std::mutex> lock(emulated::guard);
  const emulated::Barrier& mine = emulated::barriers.at(barrier);
  emulated::changed.wait(lock, [&] { return mine.phase % 2 != parity; });
}
inline void threads_meet(int barrier, int threads) { emulated::barrier_of(barrier, threads).arrive_and_wait(); }

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 || to % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  std::memcpy(emulated::shared(to), from, bytes);
  emulated::count(barrier, 0, -static_cast<int64_t>(bytes));
}
inline void copy_16(uint32_t to, const void* from, uint32_t read) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || read > 16) std::abort();
  emulated::copies.back().push_back([=] {
    std::memset(emulated::shared(to), 0, 16);
    std::memcpy(emulated::shared(to), from, read);
  });
}
inline void copies_commit() { emulated::copies.emplace_back(); }
template <int N>
void copies_wait() {
  while (emulated::copies.size() > N + 1) {
    for (const emulated::Work& copy : emulated::copies.front()) copy();
    emulated::copies.pop_front();
  }
}
inline void copies_arrive() {
  copies_commit();
  copies_wait<0>();
}
inline void writes_arrive() {}

inline void load_blocks(uint32_t (&a)[4], uint32_t row) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulated::exchanged[warp][lane][0] = row;
  __syncwarp(0xFFFFFFFFu);
  for (unsigned i = 0; i < 4; ++i)
    std::memcpy(&a[i], emulated::shared(emulated::exchanged[warp][8 * i + lane / 4][0] + 4 * (lane % 4)), 4);
  __syncwarp(0xFFFFFFFFu);
}
inline void store_blocks(uint32_t row, const uint32_t (&a)[4]) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  emulated::exchanged[warp][lane][0] = row;
  __syncwarp(0xFFFFFFFFu);
  for (unsigned i = 0; i < 4; ++i)
    std::memcpy(emulated::shared(emulated::exchanged[warp][8 * i + lane / 4][0] + 4 * (lane % 4)), &a[i], 4);
  __syncwarp(0xFFFFFFFFu);
}
inline uint4 load_shared(uint32_t at) {
  uint4 found;
  std::memcpy(&found, emulated::shared(at), 16);
  return found;
}
inline void store_shared(uint32_t at, uint4 value) { std::memcpy(emulated::shared(at), &value, 16); }

template <int N>
void more_registers() {}
template <int N>
void fewer_registers() {}
template <int N>
void held(float (&)[N]) {}
template <int N>
void held(uint32_t (&)[N]) {}

inline uint64_t descriptor(uint32_t at, int swizzle, int eight) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | (static_cast<uint64_t>(eight >> 4) << 32) |
         (static_cast<uint64_t>(swizzle == 128 ? 1 : 2) << 62);
}
inline uint64_t descriptor_turned(uint32_t at, int eight, int further) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | (static_cast<uint64_t>(further >> 4) << 16) |
         (static_cast<uint64_t>(eight >> 4) << 32) | (uint64_t{1} << 62);
}
inline uint64_t further(uint64_t of, int bytes) { return of + static_cast<uint64_t>(bytes >> 4); }
inline void products_begin() {}
inline void products_commit() { emulated::groups.emplace_back(); }
template <int N>
void products_wait() {
  __syncwarp(0xFFFFFFFFu);  // a warp's threads are in it together
  while (emulated::groups.size() > N + 1) {
    for (const emulated::Work& product : emulated::groups.front()) product();
    emulated::groups.pop_front();
  }
  __syncwarp(0xFFFFFFFFu);
}
template <bool FIRST, int N>
void multiply(float (&d)[N], uint64_t a, uint64_t b) {
  float* to = d;
  emulated::groups.back().push_back([=] {
    const int row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    for (int i = 0; i < 32; ++i) emulated::a_rows[i / 16][i % 16] = emulated::element(a, row + i / 16 * 8, i % 16);
    emulated::multiply_rows<FIRST, N>(to, b);
  });
}
template <bool FIRST, int N>
void multiply(float (&d)[N], const uint32_t* a, uint64_t b) {
  float* to = d;
  emulated::groups.back().push_back([=] {
    emulated::gather(a);
    emulated::multiply_rows<FIRST, N>(to, b);
  });
}

inline void multiply_turned(float (&d)[64], uint64_t a, uint64_t b) {
  float* to = d;
  emulated::groups.back().push_back([=] {
    const int row = static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    for (int i = 0; i < 32; ++i)
      emulated::a_rows[i / 16][i % 16] = emulated::element_turned(a, row + i / 16 * 8, i % 16);
    emulated::multiply_rows<false, 64>(to, b, emulated::element_turned);
  });
}

inline uint32_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t packed(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline uint32_t packed_relu(float low, float high) { return packed(low < 0 ? 0 : low, high < 0 ? 0 : high); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float lower(uint32_t both) { return emulated::number_of(static_cast<uint16_t>(both)); }
inline float upper(uint32_t both) { return emulated::number_of(static_cast<uint16_t>(both >> 16)); }

inline unsigned char* program_memory() { return emulated::memory; }
inline uint4 load_from_l2(const uint4* at) { return *at; }
inline void store_to_l2(uint4* at, uint4 value) { *at = value; }

}  // namespace fastmtl::cuda
