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

std::int64_t RegisterChannel(Registered entry);
void UnregisterChannel(std::int64_t id);
// A caller keeps the channel mapped for as long as it holds the pointer.
Registered FindChannel(std::int64_t id);

}  // namespace lamina
