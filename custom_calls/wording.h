// How channels of every kind speak of their operations and failures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "message.h"

namespace lamina {

enum class Code { kOk, kUnavailable, kDeadlineExceeded, kAborted, kFailedPrecondition, kOutOfRange };

struct Status {
  Code code = Code::kOk;
  std::string text;
  bool ok() const { return code == Code::kOk; }
};

// Gives a tag the name that errors use. Tags without a name appear as numbers.
void NameTag(std::int32_t tag, std::string name);

// How errors call an operation: "recv of 'attended' (step 12, layer 3, batch 1)", or without the stamp.
std::string OperationName(Role role, const Message& message);
std::string OperationName(Role role, std::int32_t tag);

// The other end, as errors call it: "attention worker 1 (pid 4711)", or "(pid 4711 on hostb)" if it is on another host.
std::string PeerName(const std::string& peer, std::uint32_t pid, const std::string& other_host = "");

// "<operation> to <peer> failed: <why>", or "from" for a recv.
std::string FailureText(Role role, const Message& message, const std::string& peer, const std::string& why);

// Why an operation failed.
std::string Mismatch(const char* what, std::int64_t expected, std::int64_t got);
std::string Difference(const Message& expected, const Message& got);  // empty if they agree
std::string TooLarge(std::uint64_t message_bytes, std::uint64_t slot_bytes);
std::string TimeoutReason(Role role, double timeout_s);
inline constexpr char kPeerLives[] = ", though the peer process has not ended";  // behind a TimeoutReason, where known
inline constexpr char kSelfClosed[] = "this side has closed the channel";
inline constexpr char kSelfAborted[] = "this side has aborted the channel";
inline constexpr char kPeerAborted[] = "the peer has aborted the channel";
inline constexpr char kPeerClosed[] = "the peer has closed the channel";
inline constexpr char kPeerDied[] = "the peer process has died";

// The program was given so many channels and the message's batch has none.
std::string NoChannel(Role role, const Message& message, std::size_t num_channels);

}  // namespace lamina
