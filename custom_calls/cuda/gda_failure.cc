#include "gda_failure.h"

#include <cstdio>

#include "shm_channel.h"

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

std::string Mismatch(const char* what, std::int64_t expected, std::int64_t got) {
  return std::string("it is not the message that was expected: expected ") + what + " " + std::to_string(expected) +
         ", got " + std::to_string(got);
}

std::string Difference(const Message& expected, const Message& got) {
  if (got.tag != expected.tag) return Mismatch("tag", expected.tag, got.tag);
  if (got.step != expected.step) return Mismatch("step", expected.step, got.step);
  if (got.layer != expected.layer) return Mismatch("layer", expected.layer, got.layer);
  if (got.batch != expected.batch) return Mismatch("batch", expected.batch, got.batch);
  if (got.num_tensors != expected.num_tensors) return Mismatch("tensor count", expected.num_tensors, got.num_tensors);
  if (got.payload_bytes != expected.payload_bytes) {
    return Mismatch("payload bytes", expected.payload_bytes, got.payload_bytes);
  }
  return "its tensors differ in dtype, or in how the bytes are divided among them";
}

std::string TimeoutText(Role role, double timeout_s) {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%g s", timeout_s);
  return role == Role::kWriter ? "no slot became free within " + std::string(seconds)
                               : "nothing arrived within " + std::string(seconds);
}

std::string ReasonText(const FailureRecord& record, Role role, double timeout_s) {
  switch (static_cast<Reason>(record.reason)) {
    case Reason::kTimeout:
      return TimeoutText(role, timeout_s);
    case Reason::kAborted:
      return "this side has aborted the channel";
    case Reason::kClosed:
      return "this side has closed the channel";
    case Reason::kPeerAborted:
      return "the peer has aborted the channel";
    case Reason::kPeerClosed:
      return "the peer has closed the channel";
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
  return OperationName(role, record.expected) + (role == Role::kWriter ? " to " : " from ") + peer +
         " failed: " + ReasonText(record, role, timeout_s);
}

}  // namespace lamina::cuda::gda
