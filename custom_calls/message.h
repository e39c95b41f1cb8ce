// What the two ends of a channel agree on: the bytes of a ring in shared memory and of a message in it.
//
//   [RingHeader] [slot 0] [slot 1] ... [slot num_slots - 1]
//   slot = [SlotHeader] [tensor 0] [padding] [tensor 1] [padding] ...      (slot_bytes after the header)
//
// Message n (from 0) lies in slot n % num_slots. A tensor is dense and row-major and starts on a cache line. Everything
// is in the byte order of the host, which both ends share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace lamina {

inline constexpr std::size_t kLine = 64;
inline constexpr std::uint64_t kRingMagic = 0x31474e49524d414c;  // "LAMRING1"
inline constexpr std::uint32_t kRingVersion = 3;

inline constexpr std::uint64_t AlignToLine(std::uint64_t bytes) { return (bytes + kLine - 1) & ~(kLine - 1); }

struct Message {
  std::uint64_t payload_bytes = 0;  // all tensors, each padded to whole cache lines
  std::uint64_t layout = 0;         // LayoutOf over dtype and size of every tensor, in order
  std::int32_t tag = 0;
  std::int32_t step = 0;
  std::int32_t layer = 0;
  std::int32_t batch = 0;
  std::uint32_t num_tensors = 0;
  std::uint32_t unused = 0;
};

// The reader polls `published` of the slot it expects, so that what announces a message and what describes it come over
// in one cache line.
struct alignas(kLine) SlotHeader {
  std::atomic<std::uint64_t> published;  // n + 1 once message n is complete; 0 before the first
  Message message;
  std::uint64_t check;  // of a small message through a network: CheckOf; elsewhere whatever it is
};

// Folds one more tensor into a fingerprint, so that two tensors swapped, or bf16 read as f16, do not go unnoticed.
inline constexpr std::uint64_t LayoutOf(std::uint64_t layout, std::uint64_t dtype, std::uint64_t bytes) {
  return (layout ^ (bytes << 8 | dtype)) * 0x9e3779b97f4a7c15;
}

enum class Role : std::uint32_t { kWriter = 0, kReader = 1 };

// Bits of RingHeader::stop. Aborted: no operation of either end succeeds any more. Closed: this end will do nothing
// more, but messages already in the ring may still be received.
inline constexpr std::uint32_t AbortedBit(Role role) { return role == Role::kWriter ? 1 : 2; }
inline constexpr std::uint32_t ClosedBit(Role role) { return role == Role::kWriter ? 4 : 8; }
// Set by the process at one end when the process at the other, of this role, has died: its GPU cannot find out itself.
inline constexpr std::uint32_t DiedBit(Role role) { return role == Role::kWriter ? 16 : 32; }

// Where one end sleeps. The other end bumps `wakeups` and wakes the futex on it only if `waiting` is set.
struct alignas(kLine) SleepWord {
  std::atomic<std::uint32_t> waiting;
  std::atomic<std::uint32_t> wakeups;
};

struct RingHeader {
  // Hardly ever written: both cores keep this line.
  alignas(kLine) std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t num_slots;
  std::uint64_t slot_bytes;
  std::atomic<std::uint32_t> pids[2];  // by Role; 0 while that end is not taken
  std::atomic<std::uint32_t> stop;
  // Not 0: an end may be a GPU, which wakes nobody, so whoever waits here naps instead of sleeping. Never changes.
  std::uint32_t polled;

  alignas(kLine) std::atomic<std::uint64_t> read_seq;  // messages read so far; only the reader stores
  SleepWord sleep[2];                                  // by Role of the sleeper
};

static_assert(sizeof(SlotHeader) == kLine && sizeof(Message) == 40);
static_assert(offsetof(SlotHeader, message) == 8 && offsetof(Message, num_tensors) == 32);
static_assert(offsetof(SlotHeader, check) == 48);
static_assert(sizeof(RingHeader) == 4 * kLine);
static_assert(offsetof(RingHeader, pids) == 24 && offsetof(RingHeader, stop) == 32);
static_assert(offsetof(RingHeader, polled) == 36);
static_assert(offsetof(RingHeader, read_seq) == kLine && offsetof(RingHeader, sleep) == 2 * kLine);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "an atomic with a lock would not work between processes");

inline constexpr std::uint64_t SlotStride(std::uint64_t slot_bytes) { return sizeof(SlotHeader) + slot_bytes; }

inline constexpr std::uint64_t RingBytes(std::uint64_t num_slots, std::uint64_t slot_bytes) {
  return sizeof(RingHeader) + num_slots * SlotStride(slot_bytes);
}

}  // namespace lamina
