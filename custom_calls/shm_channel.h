// One end of a one-way bounded ring of messages between two processes of a host.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "message.h"
#include "wording.h"

namespace lamina {

struct EndOptions {
  Role role;
  std::string peer;  // how errors call the other end, e.g. "attention worker 1"
  double timeout_s;  // the longest that one send or recv waits
  double spin_us;    // how long it polls before it sleeps
  bool polled = false;  // to create a ring of which an end may be a GPU; to attach to one, the ring says so itself
};

// A mapping of the shared memory; unmapped and closed with the last user.
class Mapping {
 public:
  Mapping(int fd, std::uint64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  char* data() const { return data_; }
  int fd() const { return fd_; }

 private:
  int fd_;
  std::uint64_t bytes_;
  char* data_;
};

// Sending is Reserve, fill the payload, Publish; receiving is Peek, read the payload, Release. One operation at a
// time per end; a second one at the same moment is an error, not a race. The first failure is final: it aborts the
// channel for both ends, and every later operation returns it at once.
class ShmChannel {
 public:
  // Throws std::system_error if the memory is not to be had.
  static std::shared_ptr<ShmChannel> Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes);
  // Throws std::system_error if `path` does not open, std::invalid_argument if what lies there is not as described.
  static std::shared_ptr<ShmChannel> Attach(EndOptions options, const std::string& path, std::uint32_t num_slots,
                                            std::uint64_t slot_bytes);
  ~ShmChannel();

  // Waits for a free slot. On success *payload has room for message.payload_bytes.
  Status Reserve(const Message& message, char** payload);
  void Publish();

  // Waits for the next message and checks that it is the one described by `expected`.
  Status Peek(const Message& expected, const char** payload);
  void Release();

  // Ends every operation of both ends, now and later. Any thread may call it.
  void Abort();
  // Ends the operations of this end; the peer may still receive what is in the ring.
  void Close();

  std::string path() const;  // what a peer on this host opens
  std::optional<std::string> failure() const;
  std::uint32_t peer_pid() const;
  // True also for a zombie. For the one thread that operates, or watches over, this end.
  bool PeerDied();
  // Sets bits of RingHeader::stop, unless this is a fork of the process that made the channel.
  void Stop(std::uint32_t reason);
  char* memory() const { return mapping_->data(); }
  RingHeader* ring() const { return ring_; }
  std::uint32_t num_slots() const { return num_slots_; }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  Role role() const { return options_.role; }

 private:
  ShmChannel(EndOptions options, std::unique_ptr<Mapping> mapping, std::uint32_t num_slots, std::uint64_t slot_bytes);

  Role PeerRole() const { return options_.role == Role::kWriter ? Role::kReader : Role::kWriter; }
  Status Begin(const Message& message);
  bool Ready();
  Status AwaitReady(const Message& message);
  bool SpinUntilReady();
  Status SleepUntilReady(const Message& message);
  Status CheckStop(const Message& message);
  void Doze(std::uint32_t wakeups_seen, std::chrono::nanoseconds waited, std::chrono::nanoseconds left);
  void Advance(std::atomic<std::uint64_t>& sequence);
  void Wake(Role role);
  Status Fail(const Message& message, Code code, const std::string& why);
  Status FailedEarlier() const;
  SlotHeader* Slot() const {
    return reinterpret_cast<SlotHeader*>(slots_ + (next_ % num_slots_) * SlotStride(slot_bytes_));
  }

  const EndOptions options_;
  const std::unique_ptr<Mapping> mapping_;
  RingHeader* const ring_;
  char* const slots_;
  const std::uint32_t num_slots_;
  const std::uint64_t slot_bytes_;

  std::uint64_t next_ = 0;       // sequence of the message that this end handles next
  std::uint64_t read_seen_ = 0;  // the writer's copy of read_seq: it touches the reader's cache line only if it must
  int peer_pidfd_ = -1;
  const pid_t owner_ = getpid();
  bool peer_gone_ = false;
  std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  mutable std::mutex failure_mutex_;
  Status failure_;
};

}  // namespace lamina
