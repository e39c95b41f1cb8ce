#include "timeline.h"

#include <ctime>
#include <mutex>
#include <utility>

namespace lamina {
namespace {

struct Timeline {
  std::mutex mutex;
  std::size_t capacity = 0;
  DrainedTimeline recorded;
};

// Never destroyed: a program may still run in another thread while the process exits.
Timeline& TheTimeline() {
  static auto* timeline = new Timeline();
  return *timeline;
}

// Its pages are touched now, so that no call pays for them or for growth.
DrainedTimeline Empty(std::size_t capacity) {
  DrainedTimeline empty;
  empty.events.resize(capacity);
  empty.events.clear();
  return empty;
}

}  // namespace

std::atomic<bool> CallTimer::recording{false};

void StartTimeline(std::size_t capacity) {
  DrainedTimeline empty = Empty(capacity);
  Timeline& timeline = TheTimeline();
  const std::lock_guard<std::mutex> lock(timeline.mutex);
  timeline.recorded = std::move(empty);
  timeline.capacity = capacity;
  CallTimer::recording.store(capacity != 0, std::memory_order_relaxed);
}

DrainedTimeline DrainTimeline() {
  Timeline& timeline = TheTimeline();
  std::size_t capacity;
  {
    const std::lock_guard<std::mutex> lock(timeline.mutex);
    capacity = timeline.capacity;
  }
  DrainedTimeline drained = Empty(capacity);
  const std::lock_guard<std::mutex> lock(timeline.mutex);
  std::swap(drained, timeline.recorded);
  return drained;
}

std::int64_t CallTimer::Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// The clock is read under the lock, which makes the buffer sorted.
void CallTimer::Record(Role role, std::int64_t channel, const Message& message) {
  Timeline& timeline = TheTimeline();
  const std::lock_guard<std::mutex> lock(timeline.mutex);
  if (timeline.recorded.events.size() >= timeline.capacity) {
    ++timeline.recorded.dropped;
    return;
  }
  timeline.recorded.events.push_back({start_ns_, ready_ns_, Now(), channel, message.tag, message.step, message.layer,
                                      message.batch, static_cast<std::uint32_t>(role), 0});
}

}  // namespace lamina
