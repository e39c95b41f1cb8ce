// Sending and receiving over RDMA: one thread's work of waiting, checking and handing over, and the copies around it.
//
// Order of memory. Sending: all threads store the payload, the last block to finish fences and posts; the NIC reads the
// payload only after the doorbell. Receiving: the sequence number is loaded with acquire at system scope before the
// payload is read; that its arrival implies the payload's needs a GPU whose GPUDirect RDMA writes are ordered for their
// owner, which the host checks when it makes the channel. Credits travel the other way in the same manner.
#pragma once

#include <atomic>
#include <cstdint>

#include "gda_layout.h"
#include "ptx.h"

namespace lamina::cuda::gda {

inline constexpr std::uint64_t kTellPeerNs = 100'000'000;  // how long a failed end tries to say so

// --- Memory ---------------------------------------------------------------------------------------------------------

LAMINA_DEVICE RegionHeader* HeaderOf(const End& end) { return reinterpret_cast<RegionHeader*>(end.region); }

// The message that an operation is about.
struct Turn {
  std::uint64_t sequence;
  std::uint32_t slot;
};

LAMINA_DEVICE Turn NextTurn(const End& end) {
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

LAMINA_DEVICE std::uint64_t Padded(std::uint64_t bytes) { return (bytes + kLine - 1) & ~std::uint64_t{kLine - 1}; }

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

// Puts a failure on record, unless there is one already, and makes the peer fail too. Returns false, as callers do who
// have failed.
LAMINA_DEVICE bool Fail(End& end, Reason reason, const FailureRecord& details) {
  if (AtomicCasDevice(&end.failed, 0u, 1u) != 0) return false;
  FailureRecord& record = *end.record;
  record.expected = details.expected;
  record.got = details.got;
  record.expected_sequence = details.expected_sequence;
  record.got_sequence = details.got_sequence;
  record.queue_error = details.queue_error;
  FenceSystem();
  StoreReleaseSystem(&record.reason, static_cast<std::uint32_t>(reason));
  if (reason != Reason::kQueue) TellPeer(end, kStopAborted);
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

// What the two words `stop` mean. `final`: nothing succeeds any more, not even what is already there.
struct Stop {
  Reason reason;
  bool final;
};

LAMINA_DEVICE Stop StopOf(const End& end) {
  const std::uint64_t mine = LoadAcquireSystem(end.stop);
  if (mine == kStopAborted) return {Reason::kAborted, true};
  if (mine == kStopClosed) return {Reason::kClosed, true};
  const std::uint64_t peer = LoadAcquireSystem(&HeaderOf(end)->peer_stop);
  if (peer == kStopAborted) return {Reason::kPeerAborted, true};
  if (peer == kStopClosed) return {Reason::kPeerClosed, end.role == Role::kWriter};
  return {Reason::kNone, false};
}

// Polls until ready() or until it is clear that it will not be.
template <typename Ready>
LAMINA_DEVICE Reason Await(End& end, Ready ready) {
  const std::uint64_t start = NowNs();
  while (true) {
    for (std::uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      if (ready()) return Reason::kNone;
      Nanosleep(kNapNs);
    }
    const Stop stop = StopOf(end);
    // Look once more: the last message may have come in between.
    if (stop.reason != Reason::kNone) return !stop.final && ready() ? Reason::kNone : stop.reason;
    if (LoadRelaxedSystem(&end.failed) != 0) return Reason::kEarlier;
    if (QueueErrorOf(end) != kOk) return Reason::kQueue;
    if (NowNs() - start > end.timeout_ns) return Reason::kTimeout;
  }
}

// Has the reader given back the slot that message `sequence` is to take?
struct HasRoom {
  const End& end;
  std::uint64_t sequence;
  LAMINA_DEVICE bool operator()() const {
    return sequence < LoadAcquireSystem(&HeaderOf(end)->credit) + end.num_slots;
  }
};

// Is there anything newer in the slot than what it held one round ago?
struct HasMessage {
  const std::uint64_t* published;
  std::uint64_t before;
  LAMINA_DEVICE bool operator()() const { return LoadAcquireSystem(published) != before; }
};

LAMINA_DEVICE bool AwaitRoom(End& end, const Message& message, Turn turn) {
  if (message.payload_bytes > end.slot_bytes) return Fail(end, Reason::kTooLarge, message);
  const Reason reason = Await(end, HasRoom{end, turn.sequence});
  return reason == Reason::kNone || Fail(end, reason, message);
}

LAMINA_DEVICE bool SameMessage(const Message& a, const Message& b) {
  return a.tag == b.tag && a.step == b.step && a.layer == b.layer && a.batch == b.batch &&
         a.num_tensors == b.num_tensors && a.payload_bytes == b.payload_bytes && a.layout == b.layout;
}

// Waits for message `sequence` and checks that it is the one described by `expected`.
LAMINA_DEVICE bool AwaitMessage(End& end, const Message& expected, Turn turn) {
  const std::uint64_t* const published = PublishedOf(end, turn);
  const std::uint64_t sequence = turn.sequence;
  const std::uint64_t before = sequence < end.num_slots ? 0 : sequence - end.num_slots + 1;
  const Reason reason = Await(end, HasMessage{published, before});
  if (reason != Reason::kNone) return Fail(end, reason, expected);
  const std::uint64_t found = LoadRelaxedSystem(published);  // acquired while waiting
  const Message& got = *MessageOf(end, turn);
  if (found == sequence + 1 && SameMessage(expected, got)) return true;
  FailureRecord details{};
  details.expected = expected;
  details.got = got;
  details.expected_sequence = sequence;
  details.got_sequence = found - 1;
  return Fail(end, found == sequence + 1 ? Reason::kMessage : Reason::kSequence, details);
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
  const Write write = WriteValue(end.peer_region + offsetof(RegionHeader, credit), end.peer_rkey, read);
  const std::uint32_t error = PostOf(end, &write, 1, NowNs() + end.timeout_ns);
  if (error != kOk) FailPosting(end, message, error);
}

// --- A send and a recv as a grid of blocks runs them ----------------------------------------------------------------
//
// Each block waits on its own and copies its share; the last to finish hands the slot over. No block waits for another,
// so a grid needs no room on the device for all its blocks at once.
//
// `Group` is one block: leader(), blocks(), index() among the threads of the grid, count() of these, Sync() as
// __syncthreads, and Any(x), which is true in all threads of the block if x was in one. gda_kernels.cu has the GPU's;
// tests run a thread for each block.

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

// The end for the message's batch; null if there is none. The same in all threads.
LAMINA_DEVICE End* EndOf(const Call& call, const Message& message) {
  const auto batch = static_cast<std::uint32_t>(message.batch);  // a negative one becomes too large
  return batch < call.num_ends ? call.ends[batch] : nullptr;
}

// Whether the operation may start. One thread per block asks: the answer changes when the end fails.
LAMINA_DEVICE bool MayStart(const Call& call, const Message& message, const End* end) {
  if (end != nullptr) {
    return LoadRelaxedSystem(&end->id) == call.ids[message.batch] && LoadRelaxedSystem(&end->failed) == 0;
  }
  FailureRecord details{};
  details.expected = message;
  details.got.batch = static_cast<std::int32_t>(call.num_ends);
  if (LoadRelaxedSystem(&call.ends[0]->id) == call.ids[0]) Fail(*call.ends[0], Reason::kNoChannel, details);
  return false;
}

// `stop` was loaded when the operation began: on a GPU it arrives while the operation goes on.
LAMINA_DEVICE bool MayFinish(End& end, const Message& message, std::uint64_t stop) {
  if (stop == 0) return true;
  return Fail(end, stop == kStopAborted ? Reason::kAborted : Reason::kClosed, message);
}

// This thread's share of a copy. The slot's side is a multiple of 64; an XLA buffer is, but for views of others.
LAMINA_DEVICE void CopyShare(char* to, const char* from, std::uint64_t bytes, std::uint64_t index,
                             std::uint64_t count) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  const std::uint64_t chunks = addresses % sizeof(Vec16) == 0 ? bytes / sizeof(Vec16) : 0;
  for (std::uint64_t i = index; i < chunks; i += count) {
    Store16(to + i * sizeof(Vec16), Load16Once(from + i * sizeof(Vec16)));
  }
  for (std::uint64_t byte = chunks * sizeof(Vec16) + index; byte < bytes; byte += count) to[byte] = from[byte];
}

// True in the thread that is to hand the slot over: every block has done its share, and nothing has failed.
LAMINA_DEVICE bool IsLast(End& end, std::uint32_t blocks) {
  FenceSystem();
  if (AtomicAddDevice(&end.arrived, 1u) != blocks - 1) return false;
  StoreRelaxedSystem(&end.arrived, 0u);
  return LoadRelaxedSystem(&end.failed) == 0;
}

template <typename Group>
LAMINA_DEVICE void CopyStamp(const Call& call, Group group) {
  for (std::uint64_t i = group.index(); i < 3; i += group.count()) call.stamp_out[i] = call.stamp[i];
}

template <typename Group>
LAMINA_DEVICE void Send(const Call& call, Group group) {
  CopyStamp(call, group);
  const Message message = Describe(call);
  End* const end = EndOf(call, message);
  if (!group.Any(group.leader() && MayStart(call, message, end))) return;
  const std::uint64_t stop = group.leader() ? LoadRelaxedSystem(end->stop) : 0;
  const Turn turn = NextTurn(*end);
  const bool ready = group.Any(group.leader() && AwaitRoom(*end, message, turn));
  if (ready) {
    char* to = PayloadOf(*end, turn);
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare(to, call.tensors[i].data, call.tensors[i].bytes, group.index(), group.count());
      to += Padded(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  const bool done = ready && MayFinish(*end, message, stop);
  if (IsLast(*end, group.blocks()) && done) Publish(*end, message, turn);
}

template <typename Group>
LAMINA_DEVICE void Recv(const Call& call, Group group) {
  CopyStamp(call, group);
  const Message expected = Describe(call);
  End* const end = EndOf(call, expected);
  if (!group.Any(group.leader() && MayStart(call, expected, end))) return;
  const std::uint64_t stop = group.leader() ? LoadRelaxedSystem(end->stop) : 0;
  const Turn turn = NextTurn(*end);
  const bool ready = group.Any(group.leader() && AwaitMessage(*end, expected, turn));
  if (ready) {
    const char* from = PayloadOf(*end, turn);
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare(call.tensors[i].data, from, call.tensors[i].bytes, group.index(), group.count());
      from += Padded(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  const bool done = ready && MayFinish(*end, expected, stop);
  if (IsLast(*end, group.blocks()) && done) Release(*end, expected, turn);
}

}  // namespace lamina::cuda::gda
