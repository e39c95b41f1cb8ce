// Channels between two processes that reach each other by TCP: for hosts without RDMA.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "channel_end.h"
#include "message.h"
#include "system.h"
#include "tcp_frame.h"

namespace lamina {

struct TcpPeer {
  std::uint32_t pid;
  std::string host;  // empty if it is this one
};

// Slots lie in memory of this process. A thread per end, the pump, receives straight into them and sends what the
// custom call, which tries first, could not send without waiting. The pump keeps the channel alive until it ends: when
// the connection is lost or either side has stopped, and what was sent has been delivered or has had its time.
class TcpChannel final : public ChannelEnd, public std::enable_shared_from_this<TcpChannel> {
 public:
  // Throws std::system_error if the memory is not to be had.
  static std::shared_ptr<TcpChannel> Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes);

  // One of the two, once; until then nothing can be sent. Throw std::system_error if there can be no thread.
  void Accept(UniqueFd listener, const Token& token, TcpPeer peer);  // the peer will connect and present the token
  void Connect(UniqueFd socket, TcpPeer peer);                       // the peer has welcomed us

  void Abort() override;
  // Waits, but not for long, until the host of the peer has what was sent: then this process may end.
  void Close() override;

  std::uint32_t peer_pid() const override { return peer_pid_.load(std::memory_order_acquire); }

 protected:
  bool Ready() override;
  std::uint32_t stop() override { return stop_.load(std::memory_order_seq_cst); }
  std::string PeerLoss() override;
  void BeginDoze() override;
  void Doze(Nanoseconds waited, Nanoseconds left) override;
  void EndDoze() override;
  Status Advance(const Message& message) override;
  std::string PeerLabel() const override;

 private:
  // Anonymous memory, whose pages are there from the start: the first messages should not pay for page faults.
  class Memory {
   public:
    explicit Memory(std::uint64_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return data_; }

   private:
    const std::uint64_t bytes_;
    char* const data_;
  };

  TcpChannel(EndOptions options, std::unique_ptr<Memory> memory, std::uint32_t num_slots, std::uint64_t slot_bytes);

  void Start(UniqueFd listener, const Token& token, UniqueFd socket, TcpPeer peer);
  void Run(UniqueFd listener, const Token& token);
  void Pump();
  void Finish();
  void Stop(std::uint32_t reason);
  bool StoppedHere() const;
  void Kick();
  void Wake();

  // Sending. With mutex_ held.
  void Push();
  void Flush();
  bool NextFrame();
  std::size_t Unsent() const { return unsent_[0].iov_len + unsent_[1].iov_len; }
  int Pause();

  std::uint64_t Told();  // told_, taking mutex_

  // Receiving, which only the pump does. Each returns whether there may be more to receive.
  bool Receive();
  bool Discard();
  bool Handle(const Frame& frame);
  bool HandleMessage(const Frame& frame);
  bool HandleCount(const Frame& frame);
  bool Ended(int error);
  bool Malformed(const std::string& why);
  bool LinkLives();
  void Arrived();
  void Lose(const std::string& why);

  const std::unique_ptr<Memory> memory_;
  const pid_t owner_ = getpid();
  const UniqueFd kick_;  // an eventfd that ends the pump's sleep

  std::atomic<std::uint32_t> peer_pid_{0};
  std::string peer_host_;  // written before peer_pid_, then constant

  std::atomic<std::uint32_t> stop_{0};
  std::atomic<std::uint64_t> credit_{0};  // the writer: messages that the reader has given back
  SleepWord sleep_{};  // of the custom call
  std::uint32_t wakeups_seen_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;  // delivered_ or running_
  UniqueFd socket_;
  bool running_ = false;
  bool delivered_ = false;
  bool full_ = false;           // the socket takes nothing at the moment, so the pump waits until it does
  int send_error_ = 0;          // why it will never take anything again
  bool said_farewell_ = false;  // the last frame is on its way
  bool shut_ = false;           // and after it the end of the stream
  Clock::time_point stopped_at_{};
  std::uint64_t finished_ = 0;  // messages that the custom calls have published, or given back
  std::uint64_t told_ = 0;      // how many of them the peer has been told of
  Frame sending_;
  iovec unsent_[2]{};           // what the socket has yet to take of that frame and its payload
  std::string loss_;

  Frame received_;                // the header that comes, or is to come
  std::size_t header_bytes_ = 0;  // what there is of it
  std::uint64_t arrived_ = 0;     // complete messages
  char* payload_ = nullptr;       // where the payload goes on
  std::uint64_t payload_left_ = 0;
  Clock::time_point looked_{};  // at the link
};

}  // namespace lamina
