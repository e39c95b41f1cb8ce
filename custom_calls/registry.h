// The channels of this process by number, which is how a compiled program names them.
#pragma once

#include <cstdint>
#include <memory>

#include "shm_channel.h"

namespace lamina {

std::int64_t RegisterChannel(std::shared_ptr<ShmChannel> channel);
void UnregisterChannel(std::int64_t id);
// Null if there is no such channel (any more). A caller keeps the channel mapped for as long as it holds the pointer.
std::shared_ptr<ShmChannel> FindChannel(std::int64_t id);

}  // namespace lamina
