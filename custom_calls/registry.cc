#include "registry.h"

#include <map>
#include <mutex>

namespace lamina {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::int64_t, Registered> channels;
};

// Never destroyed: a program may still run in another thread while the process exits.
Registry& TheRegistry() {
  static auto* registry = new Registry();
  return *registry;
}

}  // namespace

std::int64_t RegisterChannel(Registered entry) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  std::int64_t id = 1;
  for (const auto& [taken, channel] : registry.channels) {
    if (taken != id) break;
    ++id;
  }
  registry.channels.emplace(id, std::move(entry));
  return id;
}

void UnregisterChannel(std::int64_t id) {
  Registered last;  // unmapped after the lock is released
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.channels.find(id);
  if (found == registry.channels.end()) return;
  last = std::move(found->second);
  registry.channels.erase(found);
}

Registered FindChannel(std::int64_t id) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto found = registry.channels.find(id);
  return found == registry.channels.end() ? Registered{} : found->second;
}

}  // namespace lamina
