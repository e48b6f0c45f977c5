// Things that are kept under a number, by which Python speaks of them.
#pragma once

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "cpu/tensors.h"

namespace fastmtl::cpu {

template <class T>
class Registry {
 public:
  // The one of all T; it outlives every thread that may still use it at exit.
  static Registry& global() {
    static Registry& all = *new Registry;
    return all;
  }
  int64_t add(std::shared_ptr<T> thing) {
    const std::unique_lock lock(guard_);
    things_[++last_] = std::move(thing);
    return last_;
  }
  std::shared_ptr<T> find(int64_t number) {
    const std::shared_lock lock(guard_);
    const auto found = things_.find(number);
    STD_TORCH_CHECK(found != things_.end(), "no packed model has the number ", number);
    return found->second;
  }
  void remove(int64_t number) {
    const std::unique_lock lock(guard_);
    things_.erase(number);
  }

 private:
  std::shared_mutex guard_;
  std::unordered_map<int64_t, std::shared_ptr<T>> things_;
  int64_t last_ = 0;
};

}  // namespace fastmtl::cpu
