#include "registry.h"

#include <mutex>
#include <unordered_map>

namespace lamina {
namespace {

struct Registry {
  std::mutex mutex;
  std::int64_t next_id = 1;
  std::unordered_map<std::int64_t, Registered> channels;
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
  registry.channels.emplace(registry.next_id, std::move(entry));
  return registry.next_id++;
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
