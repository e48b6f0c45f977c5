// What Hopper (sm_90a) has and CUDA C++ has no word for: barriers that count bytes, copies in bulk, products of a
// warpgroup, registers that go from one warpgroup to another. tests/gpu/emulation/hopper_on_cpu.h has the same names.
//
// Products: D [64, N] += A [64, 16] B [N, 16]^T, bf16 to fp32. B, and A unless it is in registers, lie in shared
// memory, the 16 side by side, as `descriptor` says. A thread has of D in d[4j + i], j < N / 8: row 16 warp + lane / 4
// (+ 8 where i >= 2), column 8j + 2 (lane % 4) + i % 2; of A the same of two neighbouring j, in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastmtl::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// ------------------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// The barriers are there for the other threads and the copies.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and `bytes` more must come before the phase ends.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ bool barrier_is_past(uint32_t barrier, uint32_t parity) {
  uint32_t past;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(past)
      : "r"(barrier), "r"(parity)
      : "memory");
  return past != 0;
}
// Until the phase of that parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_is_past(barrier, parity)) {
  }
}

// Threads that name the same barrier (1 to 15) wait for each other, `threads` of them.
__device__ __forceinline__ void threads_meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// --------------------------------------------------------------------------------------------------------- copies

// `bytes` (a multiple of 16) to shared memory, counted by `barrier`.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}
// 16 bytes to shared memory, of which `read` are from global memory and the others zero.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, uint32_t read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(read)
               : "memory");
}
// What this thread's copy_16 have written is there, for its own products too.
__device__ __forceinline__ void copies_arrive() {
  asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// This thread's copy_16 since the last of these are a group.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// What all but the last N groups of them have written is there for this thread (and for products behind writes_arrive).
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// What this thread has written to shared memory is there for products.
__device__ __forceinline__ void writes_arrive() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four blocks of 8 x 8 numbers of 16 bits, a row of 16 bytes at the address of each lane, block by block: a thread has
// of each the numbers of row lane / 4 from column 2 (lane % 4) on, the first in the lower half.
__device__ __forceinline__ void load_blocks(uint32_t (&a)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void store_blocks(uint32_t row, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 found;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(at)
               : "memory");
  return found;
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ------------------------------------------------------------------------------------------------------- products

template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Rows of 128 bytes (swizzle 128) or of 64, eight of them one behind the other, `eight` bytes from eight rows to the
// next; 16-byte pieces exchanged as swizzled() says. `at`: of the first row's first column to multiply.
__device__ __forceinline__ uint64_t descriptor(uint32_t at, int swizzle, int eight) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | (uint64_t{1} << 16) | (static_cast<uint64_t>(eight >> 4) << 32) |
         (static_cast<uint64_t>(swizzle == 128 ? 1 : 2) << 62);
}

// Of a matrix whose other side is multiplied: the 16 are rows of 128 bytes, 64 columns of the operand each, swizzled as
// ever; eight of them one behind the other, `eight` bytes to the next eight, `further` from 64 columns to the next.
__device__ __forceinline__ uint64_t descriptor_turned(uint32_t at, int eight, int further) {
  return static_cast<uint64_t>((at & 0x3FFFF) >> 4) | (static_cast<uint64_t>(further >> 4) << 16) |
         (static_cast<uint64_t>(eight >> 4) << 32) | (uint64_t{1} << 62);
}
// That of what lies `bytes` (a multiple of 16) behind.
__device__ __forceinline__ uint64_t further(uint64_t of, int bytes) { return of + static_cast<uint64_t>(bytes >> 4); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last N groups that were committed are done.
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from reading d before a wait, or from writing it behind a begin.
template <int N>
__device__ __forceinline__ void held(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void held(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// A thread's sums as operands: read and written, or written only.
#define FASTMTL_4(as, i) as(d[i]), as(d[i + 1]), as(d[i + 2]), as(d[i + 3])
#define FASTMTL_8(as, i) FASTMTL_4(as, i), FASTMTL_4(as, i + 4)
#define FASTMTL_12(as, i) FASTMTL_8(as, i), FASTMTL_4(as, i + 8)
#define FASTMTL_16(as, i) FASTMTL_8(as, i), FASTMTL_8(as, i + 8)
#define FASTMTL_32(as, i) FASTMTL_16(as, i), FASTMTL_16(as, i + 16)
#define FASTMTL_64(as, i) FASTMTL_32(as, i), FASTMTL_32(as, i + 32)
#define FASTMTL_128(as, i) FASTMTL_64(as, i), FASTMTL_64(as, i + 64)
#define FASTMTL_ADDED(x) "+f"(x)
#define FASTMTL_SET(x) "=f"(x)

// d = A B^T where FIRST (what d was is not read: the compiler need not keep it), else d += A B^T.
template <bool FIRST, int N>
__device__ __forceinline__ void multiply(float (&d)[N], uint64_t a, uint64_t b);
template <bool FIRST, int N>
__device__ __forceinline__ void multiply(float (&d)[N], const uint32_t* a, uint64_t b);

// `n` sums of a thread, `shape` of the product, `sums` and `operands` by their numbers; an A in registers is not
// transposed.
#define FASTMTL_PRODUCT(first, as, adds, n, shape, sums, operands, A, ...)                            \
  template <>                                                                                         \
  __device__ __forceinline__ void multiply<first, n>(float (&d)[n], A a, uint64_t b) {                \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds ", 0;\nwgmma.mma_async.sync.aligned." shape \
                 ".f32.bf16.bf16 {" sums "}, " operands ";\n}"                                        \
                 : FASTMTL_##n(as, 0)                                                                 \
                 : __VA_ARGS__, "l"(b));                                                              \
  }
#define FASTMTL_PRODUCTS(...)                          \
  FASTMTL_PRODUCT(true, FASTMTL_SET, "0", __VA_ARGS__) \
  FASTMTL_PRODUCT(false, FASTMTL_ADDED, "1", __VA_ARGS__)

FASTMTL_PRODUCTS(12, "m64n24k16", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11", "%12, %13, p, 1, 1, 0, 0",
                 uint64_t, "l"(a))
FASTMTL_PRODUCTS(128, "m64n256k16",
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
                 "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
                 "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "
                 "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, "
                 "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127",
                 "%128, %129, p, 1, 1, 0, 0", uint64_t, "l"(a))
FASTMTL_PRODUCTS(64, "m64n128k16",
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
                 "%59, %60, %61, %62, %63",
                 "%64, %65, p, 1, 1, 0, 0", uint64_t, "l"(a))
FASTMTL_PRODUCTS(16, "m64n32k16", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
                 "{%16, %17, %18, %19}, %20, p, 1, 1, 0", const uint32_t*, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
FASTMTL_PRODUCTS(32, "m64n64k16",
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0", const uint32_t*, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))
FASTMTL_PRODUCTS(64, "m64n128k16",
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
                 "%59, %60, %61, %62, %63",
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 0", const uint32_t*, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]))

// d += A^T B, of A [16, 64] and B [16, 128] by descriptor_turned.
__device__ __forceinline__ void multiply_turned(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 1, 1;"
      : FASTMTL_64(FASTMTL_ADDED, 0)
      : "l"(a), "l"(b));
}

#undef FASTMTL_PRODUCTS
#undef FASTMTL_PRODUCT
#undef FASTMTL_SET
#undef FASTMTL_ADDED
#undef FASTMTL_128
#undef FASTMTL_64
#undef FASTMTL_32
#undef FASTMTL_16
#undef FASTMTL_12
#undef FASTMTL_8
#undef FASTMTL_4

// --------------------------------------------------------------------------------------------------------- numbers

// Two numbers rounded to bf16, the first in the lower half.
__device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
// The same of the numbers or of zero where they are negative.
__device__ __forceinline__ uint32_t packed_relu(float low, float high) {
  uint32_t both;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float lower(uint32_t both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float upper(uint32_t both) { return __uint_as_float(both & 0xFFFF0000u); }

// ----------------------------------------------------------------------------------------------------------- memory

// The program's shared memory, at a multiple of 1024.
__device__ __forceinline__ unsigned char* program_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
// What one thread writes and reads again, past the L1 cache.
__device__ __forceinline__ uint4 load_from_l2(const uint4* at) { return __ldcg(at); }
__device__ __forceinline__ void store_to_l2(uint4* at, uint4 value) { __stcg(at, value); }

}  // namespace fastmtl::cuda
