// One end of a one-way bounded ring of messages, as the custom calls of a CPU use it, whatever carries the messages.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "message.h"
#include "wording.h"

namespace lamina {

using Clock = std::chrono::steady_clock;
using Nanoseconds = std::chrono::nanoseconds;

// How often a sleeper looks whether its peer still lives.
inline constexpr Nanoseconds kSlice = std::chrono::milliseconds(100);

struct EndOptions {
  Role role;
  std::string peer;  // how errors call the other end, e.g. "attention worker 1"
  double timeout_s;  // the longest that one send or recv waits
  double spin_us;    // how long it polls before it sleeps
  bool polled = false;  // to create a ring of which an end may be a GPU; to attach to one, the ring says so itself
  // The peer is on another host, and to be woken is dear: it polls long, unless the wait before lasted longer still.
  bool remote = false;
};

// Sending is Reserve, fill the payload, Publish; receiving is Peek, read the payload, Release. One operation at a
// time per end; a second one at the same moment is an error, not a race. The first failure is final: it aborts the
// channel for both ends, and every later operation returns it at once.
//
// A kind of channel says where the slots are and how it comes by what the other end did; waiting, its bounds and the
// words of its failures are the same for all of them.
class ChannelEnd {
 public:
  virtual ~ChannelEnd() = default;
  ChannelEnd(const ChannelEnd&) = delete;
  ChannelEnd& operator=(const ChannelEnd&) = delete;

  // Waits for a free slot. On success *payload has room for message.payload_bytes.
  Status Reserve(const Message& message, char** payload);
  Status Publish();

  // Waits for the next message and checks that it is the one described by `expected`.
  Status Peek(const Message& expected, const char** payload);
  Status Release();

  // Ends every operation of both ends, now and later. Any thread may call it.
  virtual void Abort() = 0;
  // Ends the operations of this end; the peer may still receive what was sent.
  virtual void Close() = 0;

  std::optional<std::string> failure() const;
  // The process at the other end; 0 while it is not known.
  virtual std::uint32_t peer_pid() const = 0;
  std::uint32_t num_slots() const { return num_slots_; }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  Role role() const { return options_.role; }

 protected:
  // `slots`: num_slots slots as in message.h. A writer's hold what it sends, a reader's what has arrived.
  ChannelEnd(EndOptions options, char* slots, std::uint32_t num_slots, std::uint64_t slot_bytes);

  // The reader: is message `next()` there, or something else in its place? The writer: is its slot free?
  virtual bool Ready() = 0;
  // Bits as in RingHeader::stop, of both ends, as far as known here.
  virtual std::uint32_t stop() = 0;
  // Why the peer will do nothing any more, or empty. Asked now and then while waiting.
  virtual std::string PeerLoss() = 0;
  // From here on whatever makes Ready() or stop() change ends Doze() early, or is noticed before it sleeps.
  virtual void BeginDoze() = 0;
  // Sleeps until something may have changed, but not much longer than kSlice, and not longer than `left`.
  virtual void Doze(Nanoseconds waited, Nanoseconds left) = 0;
  virtual void EndDoze() = 0;
  // Makes message `next()` known to the reader, or its slot free for the writer.
  virtual Status Advance(const Message& message) = 0;
  // How errors call the other end.
  virtual std::string PeerLabel() const { return PeerName(options_.peer, peer_pid()); }

  Status Fail(const Message& message, Code code, const std::string& why);
  Role PeerRole() const { return options_.role == Role::kWriter ? Role::kReader : Role::kWriter; }
  std::uint64_t next() const { return next_; }
  // What the operation under way is about; for the thread that operates.
  const Message& current() const { return current_; }
  SlotHeader* Slot(std::uint64_t number) const {
    return reinterpret_cast<SlotHeader*>(slots_ + (number % num_slots_) * SlotStride(slot_bytes_));
  }

  const EndOptions options_;

 private:
  Status Begin(const Message& message);
  Status End();
  Status AwaitReady(const Message& message);
  bool SpinUntilReady(Clock::time_point start);
  Status SleepUntilReady(const Message& message, Clock::time_point start);
  Status CheckStop(const Message& message);
  Status FailedEarlier() const;

  char* const slots_;
  const std::uint32_t num_slots_;
  const std::uint64_t slot_bytes_;

  std::uint64_t next_ = 0;  // number of the message that this end handles next
  Message current_;         // what the operation under way is about
  bool waited_long_ = false;  // whether the last wait lasted longer than spin_us
  std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  mutable std::mutex failure_mutex_;
  Status failure_;
};

}  // namespace lamina
