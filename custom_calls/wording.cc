#include "wording.h"

#include <map>
#include <mutex>

namespace lamina {
namespace {

std::mutex tag_mutex;

std::map<std::int32_t, std::string>& TagNames() {
  static auto* names = new std::map<std::int32_t, std::string>();
  return *names;
}

std::string TagName(std::int32_t tag) {
  const std::lock_guard<std::mutex> lock(tag_mutex);
  const auto found = TagNames().find(tag);
  return found == TagNames().end() ? "tag " + std::to_string(tag) : "'" + found->second + "'";
}

std::string StampText(const Message& message) {
  return "(step " + std::to_string(message.step) + ", layer " + std::to_string(message.layer) + ", batch " +
         std::to_string(message.batch) + ")";
}

}  // namespace

void NameTag(std::int32_t tag, std::string name) {
  const std::lock_guard<std::mutex> lock(tag_mutex);
  TagNames()[tag] = std::move(name);
}

std::string OperationName(Role role, std::int32_t tag) {
  return std::string(role == Role::kWriter ? "send" : "recv") + " of " + TagName(tag);
}

std::string OperationName(Role role, const Message& message) {
  return OperationName(role, message.tag) + " " + StampText(message);
}

std::string PeerName(const std::string& peer, std::uint32_t pid, const std::string& other_host) {
  if (pid == 0) return peer + " (not attached yet)";
  return peer + " (pid " + std::to_string(pid) + (other_host.empty() ? "" : " on " + other_host) + ")";
}

std::string FailureText(Role role, const Message& message, const std::string& peer, const std::string& why) {
  return OperationName(role, message) + (role == Role::kWriter ? " to " : " from ") + peer + " failed: " + why;
}

std::string Mismatch(const char* what, std::int64_t expected, std::int64_t got) {
  return std::string("it is not the message that was expected: expected ") + what + " " + std::to_string(expected) +
         ", got " + std::to_string(got);
}

std::string Difference(const Message& expected, const Message& got) {
  if (got.tag != expected.tag) {
    return "it is not the message that was expected: expected " + TagName(expected.tag) + ", got " + TagName(got.tag) +
           " " + StampText(got);
  }
  if (got.step != expected.step) return Mismatch("step", expected.step, got.step);
  if (got.layer != expected.layer) return Mismatch("layer", expected.layer, got.layer);
  if (got.batch != expected.batch) return Mismatch("batch", expected.batch, got.batch);
  if (got.num_tensors != expected.num_tensors) return Mismatch("tensor count", expected.num_tensors, got.num_tensors);
  if (got.payload_bytes != expected.payload_bytes) {
    return Mismatch("payload bytes", expected.payload_bytes, got.payload_bytes);
  }
  if (got.layout != expected.layout) return "its tensors differ in dtype, or in how the bytes are divided among them";
  return "";
}

std::string TooLarge(std::uint64_t message_bytes, std::uint64_t slot_bytes) {
  return "the message has " + std::to_string(message_bytes) + " bytes and a slot of the ring " +
         std::to_string(slot_bytes);
}

std::string TimeoutReason(Role role, double timeout_s) {
  std::string seconds = std::to_string(timeout_s);
  seconds.erase(seconds.find_last_not_of('0') + 1);
  if (seconds.back() == '.') seconds.pop_back();
  return (role == Role::kReader ? "no message came in " : "no slot of the ring came free in ") + seconds + " s";
}

std::string NoChannel(Role role, const Message& message, std::size_t num_channels) {
  return OperationName(role, message) + " failed: the program has " + std::to_string(num_channels) +
         " channel(s), one per batch from 0";
}

}  // namespace lamina
