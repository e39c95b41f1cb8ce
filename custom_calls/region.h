// What the two ends of a channel through a network agree on that lets them write to each other's memory (RDMA).
//
//   Region = [RegionHeader] [slot 0] [slot 1] ... [slot num_slots - 1], one at each end, slots as in message.h. The
//   writer's slots are where it stages messages, the reader's are where they arrive. The header holds what the peer
//   writes: the reader its credit and for what it sleeps, and either end that it has stopped.
#pragma once

#include <cstddef>
#include <cstdint>

#include "message.h"

namespace lamina {

// Values of the words by which one side says that it has stopped; 0 before. A higher one replaces a lower one.
inline constexpr std::uint64_t kStopClosed = 1;   // what was sent before may still be received
inline constexpr std::uint64_t kStopAborted = 2;  // nothing succeeds any more

struct RegionHeader {
  alignas(kLine) std::uint64_t credit;     // messages that the reader has given back
  alignas(kLine) std::uint64_t peer_stop;
  std::uint64_t peer_sleeps;  // n + 1 once the reader sleeps until message n wakes it. A GPU never does.
};
static_assert(sizeof(RegionHeader) == 2 * kLine && offsetof(RegionHeader, peer_sleeps) == kLine + 8);

// Up to three cache lines of tensors: with its head such a message fits into a work request (`_MAX_INLINE` in verbs.py).
inline constexpr bool IsSmall(std::uint64_t payload_bytes) { return payload_bytes <= 192; }

// A fingerprint of what lies in a slot: its sequence number, its message and `payload_bytes` behind it. The slot may be
// written to meanwhile: what is half old and half new has, but for a rare chance, not that of the new.
inline std::uint64_t CheckOf(const SlotHeader& slot, std::uint64_t payload_bytes) {
  using Word [[gnu::may_alias]] = std::uint64_t;
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15;
  std::uint64_t check = 0;
  const auto fold = [&check](const void* start, std::uint64_t bytes) {
    const auto* const words = static_cast<const Word*>(start);
    for (std::uint64_t i = 0; i < bytes / sizeof(Word); ++i) {
      // A product carries nothing downwards: with only one, differences of top bits would cancel out.
      check = (check ^ __atomic_load_n(words + i, __ATOMIC_RELAXED)) * kOdd;
      check = (check ^ check >> 29) * kOdd;
    }
  };
  fold(&slot, offsetof(SlotHeader, check));
  fold(&slot + 1, payload_bytes);
  return check;
}

inline constexpr std::uint64_t RegionBytes(std::uint64_t num_slots, std::uint64_t slot_bytes) {
  return sizeof(RegionHeader) + num_slots * SlotStride(slot_bytes);
}

// Messages that the reader takes before it gives their slots back, so that a credit costs a WRITE only so often. The
// writer, once it finds no room, has at least that many messages to wait for, so it never waits for a credit that the
// reader withholds.
inline constexpr std::uint32_t CreditBatch(std::uint32_t num_slots) { return num_slots < 2 ? 1 : num_slots / 2; }

}  // namespace lamina
