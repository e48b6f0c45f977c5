// How ops are given to torch: as TORCH_BOX gives them, but for their errors, which torch raises. An exception of ours
// that torch caught would end the process where a compiler has linked its C++ runtime into this library (-static-libgcc
// -static-libstdc++): the one that throws is not the one that catches then.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <exception>
#include <string>

namespace fastmtl {

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// What went wrong, or null. A function of its own: whom torch's exception passes has nothing to destroy.
template <Boxed OP>
[[gnu::noinline]] const char* error_of(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  thread_local std::string error;
  try {
    OP(stack, n_arguments, n_results);
    return nullptr;
  } catch (const std::exception& raised) {
    error = raised.what();
  } catch (...) {
    error = "an error of no known type";
  }
  return error.c_str();
}

template <Boxed OP>
void raising(StableIValue* stack, uint64_t n_arguments, uint64_t n_results) {
  const char* error = error_of<OP>(stack, n_arguments, n_results);
  if (error) aoti_torch_check(false, "fastmtl", "csrc", 0, error);
}

}  // namespace fastmtl

#define FASTMTL_BOX(op) fastmtl::raising<TORCH_BOX(op)>
