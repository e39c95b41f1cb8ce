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

// --- Atomic read-modify-write: acquire and release; each returns the value before ------------------------------------
// Acquire and release because they are what hands over a slot, an index or a lock.

#if defined(__CUDA_ARCH__)
#define LAMINA_ATOMIC(Name, operation, scope, T, letter)                                        \
  LAMINA_DEVICE T Name(T* at, T value) {                                                        \
    T before;                                                                                   \
    asm volatile("atom.acq_rel." scope "." operation " %0, [%1], %2;"                           \
                 : "=" letter(before)                                                           \
                 : "l"(at), letter(value)                                                       \
                 : "memory");                                                                   \
    return before;                                                                              \
  }
#define LAMINA_ATOMIC_CAS(Name, operation, scope, T, letter)                                    \
  LAMINA_DEVICE T Name(T* at, T expected, T desired) {                                          \
    T before;                                                                                   \
    asm volatile("atom.acq_rel." scope "." operation " %0, [%1], %2, %3;"                       \
                 : "=" letter(before)                                                           \
                 : "l"(at), letter(expected), letter(desired)                                   \
                 : "memory");                                                                   \
    return before;                                                                              \
  }
#else
namespace host {

template <typename T>
inline T Max(T* at, T value) {
  T before = __atomic_load_n(at, __ATOMIC_ACQUIRE);
  while (before < value &&
         !__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return before;
}

template <typename T>
inline T Cas(T* at, T expected, T desired) {
  __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

}  // namespace host

#define LAMINA_HOST_ATOMICS(Scope, T)                                                                        \
  LAMINA_DEVICE T AtomicAdd##Scope(T* at, T value) { return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL); } \
  LAMINA_DEVICE T AtomicMax##Scope(T* at, T value) { return host::Max(at, value); }                          \
  LAMINA_DEVICE T AtomicExchange##Scope(T* at, T value) {                                                    \
    return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL);                                                 \
  }                                                                                                          \
  LAMINA_DEVICE T AtomicCas##Scope(T* at, T expected, T desired) { return host::Cas(at, expected, desired); }
#endif

#if defined(__CUDA_ARCH__)
#define LAMINA_DEVICE_ATOMICS(Scope, scope, T, bits, letter)                       \
  LAMINA_ATOMIC(AtomicAdd##Scope, "add.u" bits, scope, T, letter)                  \
  LAMINA_ATOMIC(AtomicMax##Scope, "max.u" bits, scope, T, letter)                  \
  LAMINA_ATOMIC(AtomicExchange##Scope, "exch.b" bits, scope, T, letter)            \
  LAMINA_ATOMIC_CAS(AtomicCas##Scope, "cas.b" bits, scope, T, letter)

LAMINA_DEVICE_ATOMICS(Device, "gpu", std::uint32_t, "32", "r")
LAMINA_DEVICE_ATOMICS(Device, "gpu", std::uint64_t, "64", "l")
LAMINA_DEVICE_ATOMICS(System, "sys", std::uint32_t, "32", "r")
LAMINA_DEVICE_ATOMICS(System, "sys", std::uint64_t, "64", "l")

#undef LAMINA_DEVICE_ATOMICS
#undef LAMINA_ATOMIC_CAS
#undef LAMINA_ATOMIC
#else
LAMINA_HOST_ATOMICS(Device, std::uint32_t)
LAMINA_HOST_ATOMICS(Device, std::uint64_t)
LAMINA_HOST_ATOMICS(System, std::uint32_t)
LAMINA_HOST_ATOMICS(System, std::uint64_t)

#undef LAMINA_HOST_ATOMICS
#endif

// --- Fences and time ----------------------------------------------------------------------------------------------

// Orders everything this thread did before it against everything after, for all observers in the system.
LAMINA_DEVICE void FenceSystem() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.sys;" ::: "memory");
#elif defined(LAMINA_THREAD_SANITIZER)
  // ThreadSanitizer does not model fences. On a CPU the loads and stores above order what they must on their own, so
  // nothing is lost by leaving it out, and a race that only a fence would cover is reported rather than hidden.
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// As FenceSystem, for the threads of this device only.
LAMINA_DEVICE void FenceDevice() {
#if defined(__CUDA_ARCH__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#elif !defined(LAMINA_THREAD_SANITIZER)
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

// Nanoseconds of a clock that all threads of the device share; its origin means nothing. The step of the GPU's is about
// 1 us or better (PTX ISA, %globaltimer: unspecified), fit for bounding waits.
LAMINA_DEVICE std::uint64_t NowNs() {
#if defined(__CUDA_ARCH__)
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
#else
  using std::chrono::nanoseconds;
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<nanoseconds>(since).count());
#endif
}

// Lets other threads run for about `ns` (at most 1 ms on a GPU).
LAMINA_DEVICE void Nanosleep(std::uint32_t ns) {
#if defined(__CUDA_ARCH__)
  asm volatile("nanosleep.u32 %0;" ::"r"(ns) : "memory");
#else
  // On a CPU the other end may need this very core.
  static_cast<void>(ns);
  std::this_thread::yield();
#endif
}

// --- Byte order: GPUs and the CPUs they go with are little-endian, mlx5 structures are big-endian ------------------

LAMINA_DEVICE std::uint32_t SwapBytes32(std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(value, 0, 0x0123);
#else
  return __builtin_bswap32(value);
#endif
}

LAMINA_DEVICE std::uint64_t SwapBytes64(std::uint64_t value) {
  return static_cast<std::uint64_t>(SwapBytes32(static_cast<std::uint32_t>(value))) << 32 |
         SwapBytes32(static_cast<std::uint32_t>(value >> 32));
}

LAMINA_DEVICE std::uint16_t SwapBytes16(std::uint16_t value) {
  return static_cast<std::uint16_t>(value << 8 | value >> 8);
}

}  // namespace lamina::cuda
