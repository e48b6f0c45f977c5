// A shuffle that is drawn as far as it is needed: what stands at a place is final once its step was taken.
//
// Step i (Fisher and Yates, forwards, as torch.randperm takes it) exchanges the entries i and i + draw % (n - i).
//
// Layout      order [n], 0 .. n - 1 before the first step; draws are 32 bits each.
// Threading   one: each step reads what the last one wrote.
// Memory      the entries of the next steps are fetched ahead; each would be a wait for memory of its own otherwise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace fastmtl {

constexpr int64_t kShuffleBlock = 32;  // steps whose entries are fetched at once

// Takes `count` steps from `begin` on.
template <typename T>
void shuffle_ahead(T* order, int64_t n, int64_t begin, const int64_t* draws, int64_t count) {
  int64_t places[2][kShuffleBlock];
  const auto aim = [&](int64_t first, int64_t* to) {
    const int64_t size = std::min(kShuffleBlock, count - first);
    for (int64_t j = 0; j < size; ++j) {
      const int64_t i = begin + first + j;
      to[j] = i + static_cast<uint32_t>(draws[first + j]) % static_cast<uint32_t>(n - i);
      __builtin_prefetch(order + to[j], 1);
    }
  };
  aim(0, places[0]);
  for (int64_t first = 0, turn = 0; first < count; first += kShuffleBlock, turn = 1 - turn) {
    aim(first + kShuffleBlock, places[1 - turn]);
    const int64_t size = std::min(kShuffleBlock, count - first);
    for (int64_t j = 0; j < size; ++j) std::swap(order[begin + first + j], order[places[turn][j]]);
  }
}

}  // namespace fastmtl
