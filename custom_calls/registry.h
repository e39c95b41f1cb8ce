// The channels of this process by number, which is how a compiled program names them.
#pragma once

#include <cstdint>
#include <memory>

#include "channel_end.h"

namespace lamina {

// Programs of any device may use the channel.
inline constexpr std::int32_t kAnyDevice = -1;

struct Registered {
  std::shared_ptr<ChannelEnd> channel;  // null if there is no such channel (any more)
  std::int32_t device = kAnyDevice;     // ordinal of the one device whose programs use it
};

// The lowest number that is free, so that programs of one session name the same channels as those of the session before
// and a cache of compiled programs knows them. Whoever has closed the channels of a session waits for its programs before
// the next one opens.
std::int64_t RegisterChannel(Registered entry);
void UnregisterChannel(std::int64_t id);
// A caller keeps the channel mapped for as long as it holds the pointer.
Registered FindChannel(std::int64_t id);

}  // namespace lamina
