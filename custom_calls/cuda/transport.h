// Waiting for a slot, checking what lies in it, handing it over: one thread's work, on a GPU or (in tests) on a CPU.
//
// Order of memory: the payload is written, then a fence of system scope, then the sequence number with a release store
// of system scope; the other side loads that with acquire before it reads the payload. The same holds for the credit
// that goes back. A GPU makes no read-modify-write on host memory: not every PCIe bus has them.
#pragma once

#include <atomic>
#include <cstdint>

#include "layout.h"
#include "ptx.h"

namespace lamina::cuda {

// Polls between looks at the clock and at what the host says.
inline constexpr std::uint32_t kPollsPerLook = 16;
inline constexpr std::uint32_t kNapNs = 40;

LAMINA_DEVICE std::uint64_t* Word(std::atomic<std::uint64_t>& word) { return reinterpret_cast<std::uint64_t*>(&word); }
LAMINA_DEVICE std::uint32_t* Word(std::atomic<std::uint32_t>& word) { return reinterpret_cast<std::uint32_t*>(&word); }

// The message whose turn it is, and where it lies.
struct Turn {
  std::uint64_t sequence;
  SlotHeader* slot;
  LAMINA_DEVICE char* payload() const { return reinterpret_cast<char*>(slot + 1); }
};

LAMINA_DEVICE Turn TurnOf(const End& end) {
  const std::uint32_t slot = LoadRelaxedSystem(&end.slot);
  return {LoadRelaxedSystem(&end.next), reinterpret_cast<SlotHeader*>(end.slots + slot * SlotStride(end.slot_bytes))};
}

LAMINA_DEVICE void NextTurn(End& end, const Turn& turn) {
  const std::uint32_t slot = LoadRelaxedSystem(&end.slot) + 1;
  StoreRelaxedSystem(&end.slot, slot == end.num_slots ? 0u : slot);
  StoreRelaxedSystem(&end.next, turn.sequence + 1);
}

LAMINA_DEVICE Message Describe(const Call& call) {
  Message message;
  message.payload_bytes = call.payload_bytes;
  message.layout = call.layout;
  message.tag = call.tag;
  message.step = call.stamp[0];
  message.layer = call.stamp[1];
  message.batch = call.stamp[2];
  message.num_tensors = call.num_tensors;
  return message;
}

// Puts a failure on record, unless there is one already. Returns false, for the convenience of callers.
LAMINA_DEVICE bool Fail(End& end, Reason reason, const FailureRecord& details) {
  if (AtomicCasDevice(&end.failed, 0u, 1u) != 0) return false;
  FailureRecord& record = *end.record;
  record.expected = details.expected;
  record.got = details.got;
  record.expected_sequence = details.expected_sequence;
  record.got_sequence = details.got_sequence;
  FenceSystem();
  StoreReleaseSystem(&record.reason, static_cast<std::uint32_t>(reason));
  return false;
}

LAMINA_DEVICE bool Fail(End& end, Reason reason, const Message& expected) {
  FailureRecord details{};
  details.expected = expected;
  return Fail(end, reason, details);
}

// What the host's word `stop` means to an operation, as in ShmChannel::CheckStop. `final`: the peer has gone, but what
// it had sent before may still be taken.
struct Stop {
  Reason reason;
  bool final;
};

LAMINA_DEVICE Stop StopOf(Role mine, std::uint32_t stop) {
  const Role peer = mine == Role::kWriter ? Role::kReader : Role::kWriter;
  if (stop & ClosedBit(mine)) return {Reason::kClosed, true};
  if (stop & AbortedBit(mine)) return {Reason::kAborted, true};
  if (stop & AbortedBit(peer)) return {Reason::kPeerAborted, true};
  if (stop & ClosedBit(peer)) return {Reason::kPeerClosed, mine == Role::kWriter};
  if (stop & DiedBit(peer)) return {Reason::kPeerDied, false};
  return {Reason::kNone, false};
}

// Polls until ready() or until it is clear that it will not be. A function object and not a lambda, which could not be
// called from both host and device.
template <typename Ready>
LAMINA_DEVICE Reason Await(End& end, Ready ready) {
  if (ready()) return Reason::kNone;
  const std::uint64_t start = NowNs();
  while (true) {
    for (std::uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      if (ready()) return Reason::kNone;
      Nanosleep(kNapNs);
    }
    const Stop stop = StopOf(end.role, LoadAcquireSystem(Word(end.ring->stop)));
    // Look once more: the last message may have come in between.
    if (stop.reason != Reason::kNone) return !stop.final && ready() ? Reason::kNone : stop.reason;
    if (LoadRelaxedSystem(&end.failed) != 0) return Reason::kEarlier;
    if (NowNs() - start > end.timeout_ns) return Reason::kTimeout;
  }
}

// Is the slot of message `sequence` free?
struct HasRoom {
  const End& end;
  std::uint64_t sequence;
  std::uint64_t& seen;
  LAMINA_DEVICE bool operator()() const {
    if (sequence < seen + end.num_slots) return true;
    seen = LoadAcquireSystem(Word(end.ring->read_seq));
    return sequence < seen + end.num_slots;
  }
};

// Is there anything newer in the slot than what it held one round ago?
struct HasMessage {
  const std::uint64_t* published;
  std::uint64_t before;
  LAMINA_DEVICE bool operator()() const { return LoadAcquireSystem(published) != before; }
};

// Waits for a free slot; *seen becomes what the reader is known to have read.
LAMINA_DEVICE bool AwaitRoom(End& end, const Message& message, const Turn& turn, std::uint64_t* seen) {
  if (message.payload_bytes > end.slot_bytes) return Fail(end, Reason::kTooLarge, message);
  *seen = LoadRelaxedSystem(&end.read_seen);
  const Reason reason = Await(end, HasRoom{end, turn.sequence, *seen});
  return reason == Reason::kNone || Fail(end, reason, message);
}

LAMINA_DEVICE bool SameMessage(const Message& a, const Message& b) {
  return a.tag == b.tag && a.step == b.step && a.layer == b.layer && a.batch == b.batch &&
         a.num_tensors == b.num_tensors && a.payload_bytes == b.payload_bytes && a.layout == b.layout;
}

// Waits for the message and checks that it is the one described by `expected`.
LAMINA_DEVICE bool AwaitMessage(End& end, const Message& expected, const Turn& turn) {
  const std::uint64_t* const published = Word(turn.slot->published);
  const std::uint64_t before = turn.sequence < end.num_slots ? 0 : turn.sequence - end.num_slots + 1;
  const Reason reason = Await(end, HasMessage{published, before});
  if (reason != Reason::kNone) return Fail(end, reason, expected);
  const std::uint64_t found = LoadRelaxedSystem(published);
  if (found == turn.sequence + 1 && SameMessage(expected, turn.slot->message)) return true;
  FailureRecord details{};
  details.expected = expected;
  details.got = turn.slot->message;
  details.expected_sequence = turn.sequence;
  details.got_sequence = found - 1;
  return Fail(end, found == turn.sequence + 1 ? Reason::kMessage : Reason::kSequence, details);
}

// The last step of an operation, by one thread once all blocks have copied.
LAMINA_DEVICE void Publish(End& end, const Message& message, const Turn& turn, std::uint64_t seen) {
  turn.slot->message = message;
  StoreRelaxedSystem(&end.read_seen, seen);
  NextTurn(end, turn);
  FenceSystem();
  StoreReleaseSystem(Word(turn.slot->published), turn.sequence + 1);
}

LAMINA_DEVICE void Release(End& end, const Turn& turn) {
  NextTurn(end, turn);
  FenceSystem();
  StoreReleaseSystem(Word(end.ring->read_seq), turn.sequence + 1);
}

// This thread's share of a copy. The slot's side is a multiple of 64; an XLA buffer is, but for views of others.
template <bool kFromSlot>
LAMINA_DEVICE void CopyShare(char* to, const char* from, std::uint64_t bytes, std::uint64_t index,
                             std::uint64_t count) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  const std::uint64_t chunks = addresses % sizeof(Vec16) == 0 ? bytes / sizeof(Vec16) : 0;
  std::uint64_t i = index;
  // Four loads in flight per thread: what makes a copy over PCIe slow is waiting.
  for (; i + 3 * count < chunks; i += 4 * count) {
    Vec16 part[4];
    for (int k = 0; k < 4; ++k) {
      const char* const at = from + (i + k * count) * sizeof(Vec16);
      part[k] = kFromSlot ? Load16Once(at) : Load16(at);
    }
    for (int k = 0; k < 4; ++k) Store16(to + (i + k * count) * sizeof(Vec16), part[k]);
  }
  for (; i < chunks; i += count) {
    const char* const at = from + i * sizeof(Vec16);
    Store16(to + i * sizeof(Vec16), kFromSlot ? Load16Once(at) : Load16(at));
  }
  for (std::uint64_t byte = chunks * sizeof(Vec16) + index; byte < bytes; byte += count) to[byte] = from[byte];
}

}  // namespace lamina::cuda
