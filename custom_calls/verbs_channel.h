// Channels between hosts over RDMA (libibverbs): each end writes to the other's memory.
//
// A message is one WRITE of its slot. It carries an immediate, which makes a completion at the peer: on that the peer may
// sleep, and it says that all bytes are in place, as what memory shows may be half of a WRITE. A small message (IsSmall)
// does without, which is faster, as long as the reader has not said that it sleeps: the reader polls the slot, and knows
// by a check over its bytes that none is missing. Credits and stops come as WRITEs with an immediate, too.
#pragma once

#include <infiniband/verbs.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "channel_end.h"
#include "region.h"
#include "system.h"

namespace lamina {

// Memory for NIC and CPU, which a fork does not share.
class Region {
 public:
  explicit Region(std::uint64_t bytes);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  char* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::uint64_t bytes_;
  char* data_;
};

// What the control path has made for one end. It stays valid until Close() has returned.
struct VerbsPort {
  ibv_qp* qp;
  ibv_cq* cq;  // of both directions, with a completion channel
  std::uint32_t lkey;
  std::uint32_t max_inline;
  std::uint32_t send_depth;
  std::uint32_t recv_depth;
  std::string where;       // this end as errors call it, e.g. "rxe0 on host-a"
  std::string state_file;  // says in its first line whether the port is up
};

struct VerbsPeer {
  std::uint64_t region;
  std::uint32_t rkey;
  std::uint32_t pid;
  std::string host;  // empty if it is this one
};

class VerbsChannel final : public ChannelEnd {
 public:
  // Throws std::system_error if the memory is not to be had.
  static std::shared_ptr<VerbsChannel> Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes);
  ~VerbsChannel() override;

  char* region() const { return region_->data(); }
  std::uint64_t region_bytes() const { return region_->bytes(); }

  // Takes the queue pair, in state INIT or later, and gives it its receives. Throws std::system_error.
  void Open(VerbsPort port);
  // Names the other end. The queue pair must be ready to send.
  void Connect(VerbsPeer peer);

  void Abort() override;
  // Waits, for a while, until what was sent has arrived, and until no operation uses the queue pair.
  void Close() override;
  std::uint32_t peer_pid() const override { return peer_pid_.load(std::memory_order_acquire); }

 protected:
  bool Ready() override;
  std::uint32_t stop() override;
  std::string PeerLoss() override;
  void BeginDoze() override;
  void Doze(Nanoseconds waited, Nanoseconds left) override;
  void EndDoze() override {}
  Status Advance(const Message& message) override;
  std::string PeerLabel() const override;

 private:
  VerbsChannel(EndOptions options, std::unique_ptr<Region> region, std::uint32_t num_slots, std::uint64_t slot_bytes);

  RegionHeader* header() const { return reinterpret_cast<RegionHeader*>(region_->data()); }
  // Whether all of message `number` is here; for the reader.
  bool Here(std::uint64_t number) const;
  // The following expect mutex_ to be held.
  int PostReceives(std::uint32_t count);
  int PostMessage(const Message& message);
  // Gives the first `count` messages back to the writer; not yet if the queue is full.
  int GiveBack(std::uint64_t count);
  // Asks for an immediate with the message that is awaited, if it could come without one.
  int PostSleep();
  // WRITE of 8 bytes to `offset` of the peer's region; with an immediate it wakes the peer.
  int PostWord(std::uint64_t offset, std::uint64_t value, bool wake);
  int Post(ibv_send_wr& request);
  bool MayPost() const { return posted_ - completed_ < port_.send_depth; }
  void Drain();
  void Take(const ibv_wc& completion);
  void Probe();
  void Lost(const std::string& why);
  std::string PortState(std::chrono::milliseconds patience) const;
  std::string Explain(const ibv_wc& completion) const;
  std::string PostFailed(int error) const;

  void Stop(std::uint64_t value);
  void Wake();
  bool Quiet();
  bool PeerIsDone() const;
  bool AwaitsSmall() const { return options_.role == Role::kReader && IsSmall(current().payload_bytes); }

  const std::unique_ptr<Region> region_;
  const UniqueFd wakeup_;  // an eventfd
  const pid_t owner_;

  mutable std::mutex mutex_;
  VerbsPort port_{};  // port_.qp is null before Open and after Close
  VerbsPeer peer_{};
  std::string loss_;
  std::uint64_t posted_ = 0;     // send requests so far
  std::uint64_t signaled_ = 0;   // the last of them that will say when it is done
  std::uint64_t completed_ = 0;  // those known to be done
  std::uint64_t credited_ = 0;   // reader: messages given back to the peer
  std::uint64_t sleeps_for_ = 0;  // reader: what the peer was told last, as RegionHeader::peer_sleeps
  std::uint32_t owed_receives_ = 0;  // used up, and not given to the queue pair again
  bool probing_ = false;
  Clock::time_point last_probe_{};

  std::atomic<std::uint64_t> arrived_{0};  // reader: messages that are here complete, by completions or as they were read
  std::atomic<std::uint64_t> own_stop_{0};
  std::atomic<bool> connected_{false};
  std::atomic<bool> dozing_{false};
  std::atomic<std::uint32_t> peer_pid_{0};
};

}  // namespace lamina
