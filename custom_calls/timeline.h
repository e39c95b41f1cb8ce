// When the custom calls of this process began, waited and ended: recorded on demand, in a buffer of fixed size.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "message.h"

namespace lamina {

// One send or recv that succeeded. Times are nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
// recorder.py reads these bytes.
struct TimelineEvent {
  std::int64_t start_ns;  // the call was entered
  std::int64_t ready_ns;  // its wait was over
  std::int64_t end_ns;    // the tensors were copied
  std::int64_t channel;
  std::int32_t tag;
  std::int32_t step;
  std::int32_t layer;
  std::int32_t batch;
  std::uint32_t role;  // kWriter: a send; kReader: a recv
  std::uint32_t unused;
};

static_assert(sizeof(TimelineEvent) == 56 && offsetof(TimelineEvent, tag) == 32 && offsetof(TimelineEvent, role) == 48);

struct DrainedTimeline {
  std::vector<TimelineEvent> events;  // in order of their ends
  std::uint64_t dropped = 0;          // how many found the buffer full
};

// Starts over with an empty buffer for so many events; none at all stops the recording.
void StartTimeline(std::size_t capacity);
// Takes what was recorded since the last call. The recording goes on.
DrainedTimeline DrainTimeline();

// Times one call. Costs one relaxed load while nothing is recorded.
class CallTimer {
 public:
  CallTimer() {
    if (recording.load(std::memory_order_relaxed)) start_ns_ = Now();
  }
  void Ready() {
    if (start_ns_ != 0) ready_ns_ = Now();
  }
  void End(Role role, std::int64_t channel, const Message& message) {
    if (start_ns_ != 0) Record(role, channel, message);
  }

  static std::atomic<bool> recording;

 private:
  static std::int64_t Now();
  void Record(Role role, std::int64_t channel, const Message& message);

  std::int64_t start_ns_ = 0;  // 0: not recorded
  std::int64_t ready_ns_ = 0;
};

}  // namespace lamina
