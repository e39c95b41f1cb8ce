// Memory accesses, fences and clocks of device code, each a thin wrapper over one PTX instruction.
//
// The same functions compile for the host, on top of the compiler's atomics, so that everything built on them runs on
// a CPU under a sanitizer. Scope `Device` orders threads of one GPU, `System` also the host, other GPUs and NICs.
// Reference: PTX ISA, "Memory Consistency Model" and "Data Movement and Conversion Instructions".
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__CUDA_ARCH__)
#include <chrono>
#include <thread>
#endif

#if defined(__CUDACC__)
#define LAMINA_DEVICE __host__ __device__ __forceinline__
#else
#define LAMINA_DEVICE inline
#endif

#if defined(__SANITIZE_THREAD__)
#define LAMINA_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LAMINA_THREAD_SANITIZER 1
#endif
#endif

namespace lamina::cuda {

// What one instruction of a thread moves at most.
struct alignas(16) Vec16 {
  std::uint32_t word[4];
};

// --- Loads and stores -------------------------------------------------------------------------------------------

LAMINA_DEVICE std::uint32_t LoadAcquireSystem(const std::uint32_t* from) {
#if defined(__CUDA_ARCH__)
  std::uint32_t value;
  asm volatile("ld.acquire.sys.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#endif
}

LAMINA_DEVICE std::uint64_t LoadAcquireSystem(const std::uint64_t* from) {
#if defined(__CUDA_ARCH__)
  std::uint64_t value;
  asm volatile("ld.acquire.sys.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#endif
}

LAMINA_DEVICE std::uint32_t LoadRelaxedSystem(const std::uint32_t* from) {
#if defined(__CUDA_ARCH__)
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

LAMINA_DEVICE std::uint64_t LoadRelaxedSystem(const std::uint64_t* from) {
#if defined(__CUDA_ARCH__)
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

LAMINA_DEVICE void StoreReleaseSystem(std::uint32_t* to, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
#else
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#endif
}

LAMINA_DEVICE void StoreReleaseSystem(std::uint64_t* to, std::uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#else
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#endif
}

LAMINA_DEVICE void StoreRelaxedSystem(std::uint32_t* to, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.sys.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
#else
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
#endif
}

LAMINA_DEVICE void StoreRelaxedSystem(std::uint64_t* to, std::uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.sys.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#else
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
#endif
}

// One 8-byte store to a register of a device that is mapped into the address space (st.mmio: exactly one access of
// exactly this size). It orders nothing by itself: have FenceSystem() before it.
LAMINA_DEVICE void StoreMmio64(std::uint64_t* to, std::uint64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.mmio.relaxed.sys.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
#else
  // Release, because a software device that reads this has no PCIe bus to order the stores before it.
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#endif
}

// Plain accesses of 16 bytes; both addresses multiples of 16. Order them with an acquire, a release or a fence.
LAMINA_DEVICE Vec16 Load16(const void* from) {
#if defined(__CUDA_ARCH__)
  Vec16 value;
  asm volatile("ld.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(from)
               : "memory");
  return value;
#else
  return *static_cast<const Vec16*>(from);
#endif
}

// As Load16, for data that is read once: it takes no room in the L1 cache and never comes from a stale line of it.
LAMINA_DEVICE Vec16 Load16Once(const void* from) {
#if defined(__CUDA_ARCH__)
  Vec16 value;
  asm volatile("ld.relaxed.sys.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(from)
               : "memory");
  return value;
#else
  return Load16(from);
#endif
}

LAMINA_DEVICE void Store16(void* to, const Vec16& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
#else
  *static_cast<Vec16*>(to) = value;
#endif
}

LAMINA_DEVICE std::uint32_t AtomicAddDevice(std::uint32_t* at, std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
#else
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
#endif
}

LAMINA_DEVICE std::uint32_t AtomicCasDevice(std::uint32_t* at, std::uint32_t expected, std::uint32_t desired) {
#if defined(__CUDA_ARCH__)
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before) : "l"(at), "r"(expected), "r"(desired) : "memory");
  return before;
#else
  __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
#endif
}

LAMINA_DEVICE void FenceSystem() {
#if defined(__CUDA_ARCH__)
  __threadfence_system();
#elif !defined(LAMINA_THREAD_SANITIZER)
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

LAMINA_DEVICE void Nanosleep(std::uint32_t ns) {
#if defined(__CUDA_ARCH__)
  __nanosleep(ns);
#else
  std::this_thread::sleep_for(std::chrono::nanoseconds(ns));
#endif
}

LAMINA_DEVICE std::uint64_t NowNs() {
#if defined(__CUDA_ARCH__)
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#else
  return static_cast<std::uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
#endif
}

}  // namespace lamina::cuda
