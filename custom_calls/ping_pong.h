// What a channel takes when no XLA is around it: messages thrown back and forth by C++ alone. With `copies` they are
// copied into a slot and out of it, as custom calls do; without, nobody touches what lies in the slots, as in perftest.
#pragma once

#include <cstdint>
#include <vector>

namespace lamina {

struct PingPong {
  std::int64_t outbox;  // numbers of this process's ends
  std::int64_t inbox;
  std::uint64_t num_bytes;  // of each message
  std::uint32_t count;
  bool first;  // whether this side throws first
  bool copies;
};

// Returns the nanoseconds of each round. Throws std::runtime_error with the failure of a channel.
std::vector<std::int64_t> Play(const PingPong& game);

// One way only: sends, or receives, `count` messages. Returns nanoseconds from the first to the last being done.
std::int64_t Stream(std::int64_t channel, std::uint64_t num_bytes, std::uint32_t count, bool copies);

}  // namespace lamina
