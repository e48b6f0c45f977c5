// Chooses, once, the build of the kernels that suits this processor.
#include <cstdlib>
#include <cstring>

#include "core/kernels.h"

namespace fastmtl {
namespace {

const Kernels& choose() {
#ifdef FASTMTL_X86
  const char* asked = std::getenv("FASTMTL_ISA");
  const auto allowed = [&](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels();
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels();
#endif
  return baseline::kernels();
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& best = choose();
  return best;
}

}  // namespace fastmtl
