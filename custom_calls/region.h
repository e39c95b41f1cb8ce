// What the two ends of a channel through a network agree on that lets them write to each other's memory (RDMA).
//
//   Region = [RegionHeader] [slot 0] [slot 1] ... [slot num_slots - 1], one at each end, slots as in message.h. The
//   writer's slots are where it stages messages, the reader's are where they arrive. The header holds what the peer
//   writes: the reader its credit, and either end that it has stopped.
#pragma once

#include <cstdint>

#include "message.h"

namespace lamina {

// Values of the words by which one side says that it has stopped; 0 before. A higher one replaces a lower one.
inline constexpr std::uint64_t kStopClosed = 1;   // what was sent before may still be received
inline constexpr std::uint64_t kStopAborted = 2;  // nothing succeeds any more

struct RegionHeader {
  alignas(kLine) std::uint64_t credit;     // messages that the reader has given back
  alignas(kLine) std::uint64_t peer_stop;
};
static_assert(sizeof(RegionHeader) == 2 * kLine);

inline constexpr std::uint64_t RegionBytes(std::uint64_t num_slots, std::uint64_t slot_bytes) {
  return sizeof(RegionHeader) + num_slots * SlotStride(slot_bytes);
}

// Messages that the reader takes before it gives their slots back, so that a credit costs a WRITE only so often. The
// writer, once it finds no room, has at least that many messages to wait for, so it never waits for a credit that the
// reader withholds.
inline constexpr std::uint32_t CreditBatch(std::uint32_t num_slots) { return num_slots < 2 ? 1 : num_slots / 2; }

}  // namespace lamina
