#include "gda_failure.h"

#include <cstdio>

#include "wording.h"

namespace lamina::cuda::gda {
namespace {

std::string SyndromeText(std::uint32_t syndrome) {
  switch (syndrome) {
    case kLocalLengthError:
      return "local length error";
    case kLocalOperationError:
      return "local queue pair operation error: it does not accept the request as written";
    case kLocalProtectionError:
      return "local protection error: the staging memory is not registered under its lkey";
    case kFlushed:
      return "flushed: the queue pair was in the error state already";
    case kRemoteInvalidRequest:
      return "remote invalid request";
    case kRemoteAccessError:
      return "remote access error: the peer's region is gone, or not registered for remote writes under its rkey";
    case kRetriesExceeded:
      return "transport retries exceeded: the peer does not answer; look at the link, the route and whether it lives";
    case kReceiverNotReady:
      return "receiver-not-ready retries exceeded";
    default:
      return "see MLX5_CQE_SYNDROME_* in infiniband/mlx5dv.h";
  }
}

std::string Hex(std::uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%02x", value);
  return text;
}

std::string ReasonText(const FailureRecord& record, Role role, double timeout_s) {
  switch (static_cast<Reason>(record.reason)) {
    case Reason::kTimeout:
      return TimeoutReason(role, timeout_s);
    case Reason::kAborted:
      return kSelfAborted;
    case Reason::kClosed:
      return kSelfClosed;
    case Reason::kPeerAborted:
      return kPeerAborted;
    case Reason::kPeerClosed:
      return kPeerClosed;
    case Reason::kSequence:
      return Mismatch("sequence", static_cast<std::int64_t>(record.expected_sequence),
                      static_cast<std::int64_t>(record.got_sequence));
    case Reason::kMessage:
      return Difference(record.expected, record.got);
    case Reason::kTooLarge:
      return "the message has " + std::to_string(record.expected.payload_bytes) +
             " bytes, more than a slot of the ring; make the channel with a larger slot_bytes";
    case Reason::kNoChannel:
      return "the program has " + std::to_string(record.got.batch) + " channel(s), one per batch from 0";
    case Reason::kQueue:
      return QueueErrorText(record.queue_error);
    case Reason::kNone:
    case Reason::kPeerDied:  // nobody on this host could say so
    case Reason::kEarlier:
      break;
  }
  return "unknown reason " + std::to_string(record.reason);
}

}  // namespace

std::string QueueErrorText(std::uint32_t error) {
  if ((error & kNicError) == 0) {
    return "the send queue is stuck: the NIC completes nothing, or the CPU proxy has stopped";
  }
  const std::uint32_t syndrome = error & 0xff, vendor = error >> 8 & 0xff;
  return "the NIC reports syndrome " + Hex(syndrome) + " (vendor " + Hex(vendor) + "), " + SyndromeText(syndrome);
}

std::string FailureText(const FailureRecord& record, Role role, const std::string& peer, double timeout_s) {
  if (LoadAcquireSystem(&record.reason) == static_cast<std::uint32_t>(Reason::kNone)) return "";
  return lamina::FailureText(role, record.expected, peer, ReasonText(record, role, timeout_s));
}

}  // namespace lamina::cuda::gda
