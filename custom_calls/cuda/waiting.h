// Waiting, failing and comparing, as the ends of every family do it: one thread's work, on a GPU or (in tests) on a CPU.
//
// These are written once for any `End`. Next to its End a family declares what they ask for:
//   Stop CurrentStop(const End&)             what the words mean by which either side says that it has stopped
//   bool Broken(End&)                        whether the way to the peer is known to be broken
//   void Probe(End&)                         sees to it that a broken way becomes known, if nothing else will
//   bool Fail(End&, Reason, const Message&)  and with const FailureRecord&: puts a failure on record; returns false
#pragma once

#include <cstdint>

#include "call.h"
#include "ptx.h"

namespace lamina::cuda {

// Polls between looks at the clock and at what the host says.
inline constexpr std::uint32_t kPollsPerLook = 16;
inline constexpr std::uint32_t kNapNs = 40;
// Between probes of one waiting thread. With what a NIC takes to give up on a peer, it has to stay below two seconds.
inline constexpr std::uint64_t kProbeNs = 250'000'000;

// `final`: nothing succeeds any more, not even what is already there. Else what the peer had sent may still be taken.
struct Stop {
  Reason reason;
  bool final;
};

// Puts a failure on record, unless there is one already; returns whether it did.
template <typename End>
LAMINA_DEVICE bool Record(End& end, Reason reason, const FailureRecord& details) {
  if (AtomicCasDevice(&end.failed, 0u, 1u) != 0) return false;
  FailureRecord& record = *end.record;
  record.expected = details.expected;
  record.got = details.got;
  record.expected_sequence = details.expected_sequence;
  record.got_sequence = details.got_sequence;
  record.queue_error = details.queue_error;
  FenceSystem();
  StoreReleaseSystem(&record.reason, static_cast<std::uint32_t>(reason));
  return true;
}

// Polls until ready() or until it is clear that it will not be. A function object and not a lambda, which could not be
// called from both host and device.
template <typename End, typename Ready>
LAMINA_DEVICE Reason Await(End& end, Ready ready) {
  if (ready()) return Reason::kNone;
  const std::uint64_t start = NowNs();
  std::uint64_t probed = start;
  while (true) {
    for (std::uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      if (ready()) return Reason::kNone;
      Nanosleep(kNapNs);
    }
    const Stop stop = CurrentStop(end);
    // Look once more: the last message may have come in between.
    if (stop.reason != Reason::kNone) return !stop.final && ready() ? Reason::kNone : stop.reason;
    if (LoadRelaxedSystem(&end.failed) != 0) return Reason::kEarlier;
    if (Broken(end)) return ready() ? Reason::kNone : Reason::kQueue;
    const std::uint64_t now = NowNs();
    if (now - start > end.timeout_ns) return Reason::kTimeout;
    if (now - probed < kProbeNs) continue;
    probed = now;
    Probe(end);
  }
}

// Is there anything newer in the slot than what it held one round ago?
struct HasMessage {
  const std::uint64_t* published;
  std::uint64_t before;
  LAMINA_DEVICE bool operator()() const { return LoadAcquireSystem(published) != before; }
};

LAMINA_DEVICE bool SameMessage(const Message& a, const Message& b) {
  return a.tag == b.tag && a.step == b.step && a.layer == b.layer && a.batch == b.batch &&
         a.num_tensors == b.num_tensors && a.payload_bytes == b.payload_bytes && a.layout == b.layout;
}

// Waits for message `sequence` in a slot and checks that it is the one described by `expected`.
template <typename End>
LAMINA_DEVICE bool AwaitMessageIn(End& end, const Message& expected, std::uint64_t sequence,
                                  const std::uint64_t* published, const Message& got) {
  const std::uint64_t before = sequence < end.num_slots ? 0 : sequence - end.num_slots + 1;
  const Reason reason = Await(end, HasMessage{published, before});
  if (reason != Reason::kNone) return Fail(end, reason, expected);
  const std::uint64_t found = LoadRelaxedSystem(published);  // acquired while waiting
  if (found == sequence + 1 && SameMessage(expected, got)) return true;
  FailureRecord details{};
  details.expected = expected;
  details.got = got;
  details.expected_sequence = sequence;
  details.got_sequence = found - 1;
  return Fail(end, found == sequence + 1 ? Reason::kMessage : Reason::kSequence, details);
}

}  // namespace lamina::cuda
