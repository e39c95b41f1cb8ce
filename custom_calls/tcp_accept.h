// How one end of a TCP channel finds the other among whoever connects to its port.
#pragma once

#include <functional>

#include "system.h"
#include "tcp_frame.h"

namespace lamina {

// Waits until a connection to `listener` presents the token, welcomes it, and returns it. Whoever presents another one,
// or nothing in time, is dropped. Returns none once `stopped()`; then `wake` has to become readable.
//
// Throws std::system_error if the host refuses connections.
UniqueFd AcceptPeer(int listener, int wake, const Token& token, const std::function<bool()>& stopped);

}  // namespace lamina
