// What Python holds of an end of a channel: the registry entry, which Close() gives up.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "channel_end.h"
#include "registry.h"

namespace lamina {

class Handle {
 public:
  Handle(std::shared_ptr<ChannelEnd> channel, std::int32_t device)
      : channel_(std::move(channel)), id_(RegisterChannel({channel_, device})) {}
  virtual ~Handle() { Close(); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  std::int64_t id() const { return id_; }

  // A null pointer once closed. Taken under a lock, because Abort() and Close() may come from two threads.
  std::shared_ptr<ChannelEnd> channel() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return channel_;
  }

  void Abort() {
    if (const auto open = channel()) open->Abort();
  }

  void Close() {
    std::shared_ptr<ChannelEnd> last;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      last = std::move(channel_);
    }
    if (last == nullptr) return;
    failure_ = last->failure();
    last->Close();
    UnregisterChannel(id_);
  }

  bool closed() const { return channel() == nullptr; }

  std::uint32_t peer_pid() const {
    const auto open = channel();
    return open ? open->peer_pid() : 0;
  }

  std::optional<std::string> failure() const {
    const auto open = channel();
    return open ? open->failure() : failure_;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<ChannelEnd> channel_;
  const std::int64_t id_;
  std::optional<std::string> failure_;
};

// The handle of an end of one kind, which has more to offer than every end has.
template <typename End>
class HandleOf : public Handle {
 public:
  HandleOf(std::shared_ptr<End> channel, std::int32_t device = kAnyDevice) : Handle(std::move(channel), device) {}

  // Throws std::invalid_argument once closed.
  std::shared_ptr<End> end() const {
    auto open = std::static_pointer_cast<End>(channel());
    if (open == nullptr) throw std::invalid_argument("the channel is closed and has no address any more");
    return open;
  }
};

}  // namespace lamina
