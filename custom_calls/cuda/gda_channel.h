// Sending and receiving over RDMA: one thread's work of waiting, checking and handing over (operations.h has the rest).
//
// Order of memory. Sending: all threads store the payload, the last block to finish fences and posts; the NIC reads the
// payload only after the doorbell. Receiving: the sequence number is loaded with acquire at system scope before the
// payload is read; that its arrival implies the payload's needs a GPU whose GPUDirect RDMA writes are ordered for their
// owner, which the host checks when it makes the channel. Credits travel the other way in the same manner.
#pragma once

#include <cstdint>

#include "gda_layout.h"
#include "waiting.h"

namespace lamina::cuda::gda {

inline constexpr std::uint64_t kTellPeerNs = 100'000'000;  // how long a failed end tries to say so

// --- Memory ---------------------------------------------------------------------------------------------------------

LAMINA_DEVICE RegionHeader* HeaderOf(const End& end) { return reinterpret_cast<RegionHeader*>(end.region); }

// The message that an operation is about.
struct Turn {
  std::uint64_t sequence;
  std::uint32_t slot;
};

LAMINA_DEVICE Turn TurnOf(const End& end) {
  return {LoadRelaxedSystem(&end.next), LoadRelaxedSystem(&end.next_slot)};
}

LAMINA_DEVICE void Advance(End& end, Turn turn) {
  StoreRelaxedSystem(&end.next, turn.sequence + 1);
  StoreRelaxedSystem(&end.next_slot, turn.slot + 1 == end.num_slots ? 0u : turn.slot + 1);
}

LAMINA_DEVICE std::uint64_t SlotOffset(const End& end, Turn turn) {
  return sizeof(RegionHeader) + turn.slot * (sizeof(SlotHeader) + end.slot_bytes);
}

LAMINA_DEVICE char* SlotOf(const End& end, Turn turn) { return end.region + SlotOffset(end, turn); }

LAMINA_DEVICE char* PayloadOf(const End& end, Turn turn) {
  return SlotOf(end, turn) + sizeof(SlotHeader);
}

LAMINA_DEVICE Message* MessageOf(const End& end, Turn turn) {
  return reinterpret_cast<Message*>(SlotOf(end, turn) + offsetof(SlotHeader, message));
}

LAMINA_DEVICE const std::uint64_t* PublishedOf(const End& end, Turn turn) {
  return reinterpret_cast<const std::uint64_t*>(SlotOf(end, turn));
}

LAMINA_DEVICE std::uint32_t PostOf(const End& end, const Write* writes, std::uint32_t count, std::uint64_t deadline) {
  return end.use_proxy != 0 ? Post(end.proxy, writes, count, deadline) : Post(end.queue, writes, count, deadline);
}

// What broke the send queue, looking at completions that nobody else may be waiting for.
LAMINA_DEVICE std::uint32_t QueueErrorOf(const End& end) {
  if (end.use_proxy != 0) return LoadAcquireSystem(&end.proxy.words->error);
  PollCompletion(end.queue);
  return ErrorOf(end.queue);
}

// --- Failures -------------------------------------------------------------------------------------------------------

// A WRITE on the same connection as messages: what was sent before is there before it.
LAMINA_DEVICE void TellPeer(const End& end, std::uint64_t stop) {
  const std::uint64_t at = end.peer_region + offsetof(RegionHeader, peer_stop);
  const Write write = WriteValue(at, end.peer_rkey, stop);
  PostOf(end, &write, 1, NowNs() + kTellPeerNs);
}

// The host of this side has aborted the end: the peer learns of it.
LAMINA_DEVICE void AbortEnd(const End& end) { TellPeer(end, kStopAborted); }

// The host of this side closes the end: it is shut to kernels that start from now on, and its memory may go once the NIC
// has delivered what was sent; what went by the CPU proxy the host waits for. Where all had ended before by an abort or a
// failure, the peer keeps that word.
LAMINA_DEVICE void CloseEnd(End& end) {
  StoreRelaxedSystem(&end.id, std::uint64_t{0});
  const bool aborted = LoadAcquireSystem(end.stop) == kStopAborted || LoadRelaxedSystem(&end.failed) != 0;
  TellPeer(end, aborted ? kStopAborted : kStopClosed);
  if (end.use_proxy == 0) Drain(end.queue, NowNs() + kDrainNs);
}

// Puts a failure on record, unless there is one already, and makes the peer fail too. Returns false, as callers do who
// have failed.
LAMINA_DEVICE bool Fail(End& end, Reason reason, const FailureRecord& details) {
  if (Record(end, reason, details) && reason != Reason::kQueue) TellPeer(end, kStopAborted);
  return false;
}

LAMINA_DEVICE bool Fail(End& end, Reason reason, const Message& expected) {
  FailureRecord details{};
  details.expected = expected;
  if (reason == Reason::kQueue) details.queue_error = QueueErrorOf(end);
  return Fail(end, reason, details);
}

LAMINA_DEVICE bool FailPosting(End& end, const Message& expected, std::uint32_t queue_error) {
  FailureRecord details{};
  details.expected = expected;
  details.queue_error = queue_error;
  return Fail(end, Reason::kQueue, details);
}

// --- Waiting --------------------------------------------------------------------------------------------------------

LAMINA_DEVICE Stop CurrentStop(const End& end) {
  const std::uint64_t mine = LoadAcquireSystem(end.stop);
  if (mine == kStopAborted) return {Reason::kAborted, true};
  if (mine == kStopClosed) return {Reason::kClosed, true};
  const std::uint64_t peer = LoadAcquireSystem(&HeaderOf(end)->peer_stop);
  if (peer == kStopAborted) return {Reason::kPeerAborted, true};
  if (peer == kStopClosed) return {Reason::kPeerClosed, end.role == Role::kWriter};
  return {Reason::kNone, false};
}

LAMINA_DEVICE bool Broken(End& end) { return QueueErrorOf(end) != kOk; }

// Gives the writer the credit that it has.
LAMINA_DEVICE Write CreditWrite(const End& end) {
  return WriteValue(end.peer_region + offsetof(RegionHeader, credit), end.peer_rkey, end.credited);
}

// Who waits sends nothing, and a NIC that sends nothing does not learn that the peer is gone. So it says again what the
// peer knows: the reader its credit, the writer, which has given none, a 0 to a word that only writers look at.
LAMINA_DEVICE void Probe(End& end) {
  const std::uint64_t deadline = NowNs() + end.timeout_ns;
  end.use_proxy != 0 ? PostIfIdle(end.proxy, CreditWrite(end), deadline)
                     : PostIfIdle(end.queue, CreditWrite(end), deadline);
}

// Has the reader given back the slot that message `sequence` is to take?
struct HasRoom {
  const End& end;
  std::uint64_t sequence;
  LAMINA_DEVICE bool operator()() const {
    return sequence < LoadAcquireSystem(&HeaderOf(end)->credit) + end.num_slots;
  }
};

LAMINA_DEVICE bool AwaitRoom(End& end, const Message& message, const Turn& turn) {
  if (message.payload_bytes > end.slot_bytes) return Fail(end, Reason::kTooLarge, message);
  const Reason reason = Await(end, HasRoom{end, turn.sequence});
  return reason == Reason::kNone || Fail(end, reason, message);
}

LAMINA_DEVICE bool AwaitMessage(End& end, const Message& expected, const Turn& turn) {
  return AwaitMessageIn(end, expected, turn.sequence, PublishedOf(end, turn), *MessageOf(end, turn));
}

LAMINA_DEVICE std::uint64_t StopWord(const End& end) { return LoadRelaxedSystem(end.stop); }

LAMINA_DEVICE bool MayFinish(End& end, const Message& message, std::uint64_t stop) {
  if (stop == 0) return true;
  return Fail(end, stop == kStopAborted ? Reason::kAborted : Reason::kClosed, message);
}

// --- Handing over: by one thread, once all blocks have copied -------------------------------------------------------

LAMINA_DEVICE void Publish(End& end, const Message& message, Turn turn) {
  *MessageOf(end, turn) = message;
  constexpr std::uint32_t kHead = offsetof(SlotHeader, message);  // the sequence number's bytes
  const std::uint64_t from = end.nic_region + SlotOffset(end, turn);
  const std::uint64_t slot = end.peer_region + SlotOffset(end, turn);
  const auto bytes = static_cast<std::uint32_t>(sizeof(SlotHeader) - kHead + message.payload_bytes);
  const Write writes[2] = {WriteFrom(slot + kHead, end.peer_rkey, from + kHead, end.lkey, bytes),
                           WriteValue(slot, end.peer_rkey, turn.sequence + 1)};
  Advance(end, turn);
  const std::uint32_t error = PostOf(end, writes, 2, NowNs() + end.timeout_ns);
  if (error != kOk) FailPosting(end, message, error);
}

LAMINA_DEVICE void Release(End& end, const Message& message, Turn turn) {
  const std::uint64_t read = turn.sequence + 1;
  Advance(end, turn);
  if (read - end.credited < CreditBatch(end.num_slots)) return;
  end.credited = read;
  const Write write = CreditWrite(end);
  const std::uint32_t error = PostOf(end, &write, 1, NowNs() + end.timeout_ns);
  // A peer that is gone needs no credit, and what it sent before is delivered. The next wait in vain says what happened.
  if (error == kStuck) FailPosting(end, message, error);
}

}  // namespace lamina::cuda::gda
