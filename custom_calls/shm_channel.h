// Channels between two processes of a host: the ring lies in memory that they share.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>

#include "channel_end.h"
#include "message.h"

namespace lamina {

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

class ShmChannel final : public ChannelEnd {
 public:
  // Throws std::system_error if the memory is not to be had.
  static std::shared_ptr<ShmChannel> Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes);
  // Throws std::system_error if `path` does not open, std::invalid_argument if what lies there is not as described.
  static std::shared_ptr<ShmChannel> Attach(EndOptions options, const std::string& path, std::uint32_t num_slots,
                                            std::uint64_t slot_bytes);
  ~ShmChannel() override;

  void Abort() override;
  void Close() override;

  std::string path() const;  // what a peer on this host opens
  std::uint32_t peer_pid() const override;
  // True also for a zombie. For the one thread that operates, or watches over, this end.
  bool PeerDied();
  // Sets bits of RingHeader::stop, unless this is a fork of the process that made the channel.
  void Stop(std::uint32_t reason);
  char* memory() const { return mapping_->data(); }
  RingHeader* ring() const { return ring_; }

 protected:
  bool Ready() override;
  std::uint32_t stop() override;
  std::string PeerLoss() override;
  void BeginDoze() override;
  void Doze(Nanoseconds waited, Nanoseconds left) override;
  void EndDoze() override;
  Status Advance(const Message& message) override;

 private:
  ShmChannel(EndOptions options, std::unique_ptr<Mapping> mapping, std::uint32_t num_slots, std::uint64_t slot_bytes);

  void Wake(Role role);

  const std::unique_ptr<Mapping> mapping_;
  RingHeader* const ring_;

  std::uint64_t read_seen_ = 0;  // the writer's copy of read_seq: it touches the reader's cache line only if it must
  std::uint32_t wakeups_seen_ = 0;
  int peer_pidfd_ = -1;
  const pid_t owner_ = getpid();
  bool peer_gone_ = false;
};

}  // namespace lamina
