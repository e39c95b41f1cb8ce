// Waiting for a slot, checking what lies in it, handing it over: one thread's work, on a GPU or (in tests) on a CPU.
//
// Order of memory: the payload is written, then a fence of system scope, then the sequence number with a release store
// of system scope; the other side loads that with acquire before it reads the payload. The same holds for the credit
// that goes back. A GPU makes no read-modify-write on host memory: not every PCIe bus has them.
#pragma once

#include <atomic>
#include <cstdint>

#include "layout.h"
#include "waiting.h"

namespace lamina::cuda {

LAMINA_DEVICE std::uint64_t* Word(std::atomic<std::uint64_t>& word) { return reinterpret_cast<std::uint64_t*>(&word); }
LAMINA_DEVICE std::uint32_t* Word(std::atomic<std::uint32_t>& word) { return reinterpret_cast<std::uint32_t*>(&word); }

// The message whose turn it is, and where it lies. `seen`: what the writer knows the reader to have read.
struct Turn {
  std::uint64_t sequence;
  SlotHeader* slot;
  std::uint64_t seen = 0;
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

LAMINA_DEVICE bool Fail(End& end, Reason reason, const FailureRecord& details) {
  Record(end, reason, details);
  return false;
}

LAMINA_DEVICE bool Fail(End& end, Reason reason, const Message& expected) {
  FailureRecord details{};
  details.expected = expected;
  return Fail(end, reason, details);
}

// What the host's word `stop` means to an operation, as in ShmChannel::CheckStop.
LAMINA_DEVICE Stop StopOf(Role mine, std::uint32_t stop) {
  const Role peer = mine == Role::kWriter ? Role::kReader : Role::kWriter;
  if (stop & ClosedBit(mine)) return {Reason::kClosed, true};
  if (stop & AbortedBit(mine)) return {Reason::kAborted, true};
  if (stop & AbortedBit(peer)) return {Reason::kPeerAborted, true};
  if (stop & ClosedBit(peer)) return {Reason::kPeerClosed, mine == Role::kWriter};
  if (stop & DiedBit(peer)) return {Reason::kPeerDied, false};
  return {Reason::kNone, false};
}

LAMINA_DEVICE Stop CurrentStop(const End& end) { return StopOf(end.role, LoadAcquireSystem(Word(end.ring->stop))); }

LAMINA_DEVICE bool Broken(End&) { return false; }  // memory does not break
LAMINA_DEVICE void Probe(End&) {}

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

LAMINA_DEVICE bool AwaitRoom(End& end, const Message& message, Turn& turn) {
  if (message.payload_bytes > end.slot_bytes) return Fail(end, Reason::kTooLarge, message);
  turn.seen = LoadRelaxedSystem(&end.read_seen);
  const Reason reason = Await(end, HasRoom{end, turn.sequence, turn.seen});
  return reason == Reason::kNone || Fail(end, reason, message);
}

LAMINA_DEVICE bool AwaitMessage(End& end, const Message& expected, const Turn& turn) {
  return AwaitMessageIn(end, expected, turn.sequence, Word(turn.slot->published), turn.slot->message);
}

LAMINA_DEVICE char* PayloadOf(const End&, const Turn& turn) { return turn.payload(); }

// Of the words that stop an end, what is looked at between the wait and the end of an operation.
LAMINA_DEVICE std::uint32_t StopWord(const End& end) { return LoadRelaxedSystem(Word(end.ring->stop)); }

LAMINA_DEVICE bool MayFinish(End& end, const Message& message, std::uint32_t stop) {
  const Stop now = StopOf(end.role, stop);
  return !now.final || Fail(end, now.reason, message);
}

// The last step of an operation, by one thread once all blocks have copied.
LAMINA_DEVICE void Publish(End& end, const Message& message, const Turn& turn) {
  turn.slot->message = message;
  StoreRelaxedSystem(&end.read_seen, turn.seen);
  NextTurn(end, turn);
  FenceSystem();
  StoreReleaseSystem(Word(turn.slot->published), turn.sequence + 1);
}

LAMINA_DEVICE void Release(End& end, const Message&, const Turn& turn) {
  NextTurn(end, turn);
  FenceSystem();
  StoreReleaseSystem(Word(end.ring->read_seq), turn.sequence + 1);
}

}  // namespace lamina::cuda
