// Chooses, once, the builds of the kernels that suit this processor.
#include "core/inference_kernels.h"
#include "core/kernels.h"
#include "core/packed_gemm.h"

#ifdef FASTMTL_X86
#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastmtl {
namespace {

#ifdef FASTMTL_X86
// Each has the ones before it.
enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx, kIsas };
constexpr const char* kNames[kIsas] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// Tiles are 8 KiB of registers, which Linux saves only for a process that has asked for them.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestComponent = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestComponent, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kAmxBf16) && (edx & kAmxTile) && may_use_tiles();
}

bool runs(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && runs(kAvx2);
    case kAvx512Bf16:
      return __builtin_cpu_supports("avx512bf16") && runs(kAvx512);
    case kAmx:
      return runs(kAvx512Bf16) && has_tiles();
    default:
      return true;
  }
}

// Intel's cores take two cycles for a dot product of pairs, so that without tiles widening to fp32 is faster (195 to
// 123 GFLOP/s measured on a core); AMD's take one.
bool worthwhile(Isa isa) { return isa != kAvx512Bf16 || !__builtin_cpu_is("intel"); }

Isa choose() {
  const char* asked = std::getenv("FASTMTL_ISA");
  for (int isa = kAmx; isa > kBaseline; --isa) {
    const bool allowed = asked == nullptr ? worthwhile(static_cast<Isa>(isa)) : std::strcmp(asked, kNames[isa]) == 0;
    if (allowed && runs(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
  }
  return kBaseline;
}

Isa best_isa() {
  static const Isa best = choose();
  return best;
}
#endif

}  // namespace

const Kernels& best_kernels() {
#ifdef FASTMTL_X86
  if (best_isa() >= kAvx512) return avx512::kernels();
  if (best_isa() == kAvx2) return avx2::kernels();
#endif
  return baseline::kernels();
}

template <>
const TileKernels<float>& best_tile_kernels() {
#ifdef FASTMTL_X86
  if (best_isa() >= kAvx512) return avx512::tile_kernels_f32();
  if (best_isa() == kAvx2) return avx2::tile_kernels_f32();
#endif
  return baseline::tile_kernels_f32();
}

template <>
const TileKernels<Bf16>& best_tile_kernels() {
#ifdef FASTMTL_X86
  if (best_isa() >= kAvx512Bf16) return avx512_bf16::tile_kernels_bf16();
  if (best_isa() == kAvx512) return avx512::tile_kernels_bf16();
  if (best_isa() == kAvx2) return avx2::tile_kernels_bf16();
#endif
  return baseline::tile_kernels_bf16();
}

const InferenceKernels& best_inference_kernels() {
#ifdef FASTMTL_X86
  if (best_isa() >= kAvx512) return avx512::inference_kernels();
  if (best_isa() == kAvx2) return avx2::inference_kernels();
#endif
  return baseline::inference_kernels();
}

const PackedGemm& best_packed_gemm() {
#ifdef FASTMTL_X86
  switch (best_isa()) {
    case kAmx:
      return amx::packed_gemm();
    case kAvx512Bf16:
      return avx512_bf16::packed_gemm();
    case kAvx512:
      return avx512::packed_gemm();
    case kAvx2:
      return avx2::packed_gemm();
    default:
      break;
  }
#endif
  return baseline::packed_gemm();
}

}  // namespace fastmtl
