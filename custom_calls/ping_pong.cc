#include "ping_pong.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "channel_end.h"
#include "registry.h"

namespace lamina {
namespace {

std::shared_ptr<ChannelEnd> Find(std::int64_t id) {
  auto channel = FindChannel(id).channel;
  if (channel == nullptr) throw std::runtime_error("there is no channel with number " + std::to_string(id));
  return channel;
}

void Require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.text);
}

Message Describe(std::uint64_t num_bytes, std::uint32_t number) {
  Message message;
  message.payload_bytes = AlignToLine(num_bytes);
  message.num_tensors = 1;
  message.step = static_cast<std::int32_t>(number);
  return message;
}

void Send(ChannelEnd& channel, const std::vector<char>& bytes, std::uint32_t number, bool copies) {
  char* payload = nullptr;
  Require(channel.Reserve(Describe(bytes.size(), number), &payload));
  if (copies) std::memcpy(payload, bytes.data(), bytes.size());
  Require(channel.Publish());
}

void Recv(ChannelEnd& channel, std::vector<char>& bytes, std::uint32_t number, bool copies) {
  const char* payload = nullptr;
  Require(channel.Peek(Describe(bytes.size(), number), &payload));
  if (copies) std::memcpy(bytes.data(), payload, bytes.size());
  Require(channel.Release());
}

std::int64_t Since(Clock::time_point start) {
  return std::chrono::duration_cast<Nanoseconds>(Clock::now() - start).count();
}

}  // namespace

std::vector<std::int64_t> Play(const PingPong& game) {
  const auto outbox = Find(game.outbox), inbox = Find(game.inbox);
  std::vector<char> bytes(game.num_bytes);
  std::vector<std::int64_t> rounds;
  rounds.reserve(game.count);
  for (std::uint32_t i = 0; i < game.count; ++i) {
    const auto start = Clock::now();
    if (game.first) Send(*outbox, bytes, i, game.copies);
    Recv(*inbox, bytes, i, game.copies);
    if (!game.first) Send(*outbox, bytes, i, game.copies);
    rounds.push_back(Since(start));
  }
  return rounds;
}

std::int64_t Stream(std::int64_t id, std::uint64_t num_bytes, std::uint32_t count, bool copies) {
  const auto channel = Find(id);
  std::vector<char> bytes(num_bytes);
  Clock::time_point start;
  for (std::uint32_t i = 0; i < count; ++i) {
    if (channel->role() == Role::kWriter) {
      Send(*channel, bytes, i, copies);
    } else {
      Recv(*channel, bytes, i, copies);
    }
    if (i == 0) start = Clock::now();
  }
  return Since(start);
}

}  // namespace lamina
