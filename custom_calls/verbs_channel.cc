#include "verbs_channel.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <fstream>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "system.h"
#include "verbs_events.h"
#include "verbs_library.h"

namespace lamina {
namespace {

// What the immediate of a WRITE says: that the messages before n are here (n modulo 2^31), or that it is no message.
constexpr std::uint32_t kMessages = 0x7fffffff;
constexpr std::uint32_t kWord = 0x80000000;

constexpr std::uint64_t kReceive = ~std::uint64_t{0};  // wr_id of every receive; sends have their number
constexpr int kBatch = 16;                             // completions taken at a time
// Receives are given back so many at a time; half of what the control path adds to one for each slot.
constexpr std::uint32_t kReceiveBatch = 8;
// How often a reader that awaits a small message looks at memory between looks at the queue.
constexpr int kLooks = 16;
// Nothing comes back from a peer that has vanished unless something is sent to it.
constexpr auto kProbeInterval = std::chrono::milliseconds(250);
// The first nap of a reader to which a small message may be on its way that will not wake it.
constexpr Nanoseconds kLeastNap = std::chrono::microseconds(100);
constexpr auto kLinger = std::chrono::seconds(2);
constexpr auto kLingerLook = std::chrono::microseconds(200);
// Requests fail a moment before a port is known to be down. It is looked at for so long, and so often.
constexpr std::chrono::milliseconds kPortTells{100};
constexpr std::chrono::milliseconds kPortPause{10};

// A credit costs as much as a message, so a reader that keeps up gives back rarely, and while it has nothing else to do:
// once it owes so many. The writer then still has a slot, so neither waits for the other.
std::uint32_t IdleCredit(std::uint32_t num_slots) { return std::max(1u, num_slots * 3 / 4); }

// A reader that does not come back to wait gives back at last.
std::uint32_t LateCredit(std::uint32_t num_slots) { return num_slots < 4 ? 1 : IdleCredit(num_slots) + 1; }

template <typename T>
T Acquire(const T& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

char* Map(std::uint64_t bytes) {
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (data == MAP_FAILED) ThrowErrno(errno, "cannot map " + std::to_string(bytes) + " bytes");
  // After a fork the parent's first write would move it to pages that the NIC does not know.
  madvise(data, bytes, MADV_DONTFORK);
  return static_cast<char*>(data);
}

}  // namespace

Region::Region(std::uint64_t bytes) : bytes_(bytes), data_(Map(bytes)) {}
Region::~Region() { munmap(data_, bytes_); }

VerbsChannel::VerbsChannel(EndOptions options, std::unique_ptr<Region> region, std::uint32_t num_slots,
                           std::uint64_t slot_bytes)
    : ChannelEnd(std::move(options), region->data() + sizeof(RegionHeader), num_slots, slot_bytes),
      region_(std::move(region)),
      wakeup_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      owner_(getpid()) {
  if (!wakeup_.open()) ThrowErrno(errno, "cannot make an eventfd");
}

VerbsChannel::~VerbsChannel() { Close(); }

std::shared_ptr<VerbsChannel> VerbsChannel::Create(EndOptions options, std::uint32_t num_slots,
                                                   std::uint64_t slot_bytes) {
  slot_bytes = AlignToLine(slot_bytes);
  auto region = std::make_unique<Region>(RegionBytes(num_slots, slot_bytes));
  return std::shared_ptr<VerbsChannel>(
      new VerbsChannel(std::move(options), std::move(region), num_slots, slot_bytes));
}

void VerbsChannel::Open(VerbsPort port) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    port_ = std::move(port);
    const int error = PostReceives(port_.recv_depth);
    if (error != 0) ThrowErrno(error, port_.where + " takes no receives");
  }
  TheVerbsEvents().Listen(port_.qp, port_.cq, [this](const std::string& why) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Lost(why + " (" + port_.where + ")");
    }
    Wake();
  });
}

void VerbsChannel::Connect(VerbsPeer peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  peer_ = std::move(peer);
  peer_pid_.store(peer_.pid, std::memory_order_release);
  connected_.store(true, std::memory_order_release);
}

std::string VerbsChannel::PeerLabel() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return PeerName(options_.peer, peer_.pid, peer_.host);
}

bool VerbsChannel::Ready() {
  if (options_.role == Role::kReader) {
    // Memory alone says when a small message is here, and is faster to look at than the queue.
    for (int looks = AwaitsSmall() ? kLooks : 1; looks > 0; --looks) {
      if (Here(next())) return true;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    Drain();
    if (Here(next())) return true;
    // Now that there is nothing else to do.
    if (port_.qp != nullptr && loss_.empty() && next() - credited_ >= IdleCredit(num_slots())) {
      if (const int error = GiveBack(next()); error != 0) Lost(PostFailed(error));
    }
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  // Also to give the queue pair receives for the credits to come.
  Drain();
  return MayPost() && next() < Acquire(header()->credit) + num_slots();
}

bool VerbsChannel::Here(std::uint64_t number) const {
  if (arrived_.load(std::memory_order_acquire) > number) return true;
  const SlotHeader& slot = *Slot(number);
  if (slot.published.load(std::memory_order_acquire) != number + 1) return false;
  const std::uint64_t payload_bytes = Acquire(slot.message.payload_bytes);
  if (!IsSmall(payload_bytes) || payload_bytes > slot_bytes()) return false;
  if (Acquire(slot.check) != CheckOf(slot, payload_bytes)) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

std::uint32_t VerbsChannel::stop() {
  const std::uint64_t mine = own_stop_.load(std::memory_order_seq_cst), theirs = Acquire(header()->peer_stop);
  const Role role = options_.role, peer = PeerRole();
  std::uint32_t bits = 0;
  if (mine & kStopClosed) bits |= ClosedBit(role);
  if (mine & kStopAborted) bits |= AbortedBit(role);
  if (theirs & kStopClosed) bits |= ClosedBit(peer);
  if (theirs & kStopAborted) bits |= AbortedBit(peer);
  return bits;
}

std::string VerbsChannel::PeerLoss() {
  ibv_context* device = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (port_.qp != nullptr) device = port_.qp->context;
  }
  if (device != nullptr) TheVerbsEvents().Take(device);
  const std::lock_guard<std::mutex> lock(mutex_);
  Drain();
  if (loss_.empty()) Probe();
  return loss_;
}

void VerbsChannel::BeginDoze() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (port_.qp == nullptr) return;
  ibv_req_notify_cq(port_.cq, 0);
  if (const int error = PostSleep(); error != 0) Lost(PostFailed(error));
}

void VerbsChannel::Doze(Nanoseconds waited, Nanoseconds left) {
  int events = -1;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (port_.qp != nullptr) events = port_.cq->channel->fd;
    dozing_ = true;
  }
  // The peer may have sent just before it learned that this end sleeps.
  const Nanoseconds nap = AwaitsSmall() ? std::max(waited, kLeastNap) : kSlice;
  const auto limit = std::min({nap, kSlice, left}).count();
  const timespec wait{static_cast<time_t>(limit / 1000000000), static_cast<long>(limit % 1000000000)};
  pollfd sources[2] = {{wakeup_.get(), POLLIN, 0}, {events, POLLIN, 0}};
  const int ready = ppoll(sources, 2, &wait, nullptr);
  dozing_ = false;
  if (ready <= 0) return;
  if (sources[0].revents != 0) {
    std::uint64_t count;
    [[maybe_unused]] const auto read_bytes = read(wakeup_.get(), &count, sizeof(count));
  }
  if (sources[1].revents == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (port_.qp != nullptr) TheVerbsLibrary().TakeEvent(port_.cq);
}

Status VerbsChannel::Advance(const Message& message) {
  int error = 0;
  std::string why;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::uint64_t done = next() + 1;
    if (port_.qp == nullptr) {
      why = kSelfClosed;
    } else if (options_.role == Role::kWriter) {
      error = PostMessage(message);
    } else {
      // What completions say counts on from here: of messages without an immediate they say nothing.
      if (arrived_.load(std::memory_order_relaxed) < done) arrived_.store(done, std::memory_order_release);
      if (done - credited_ >= (Here(done) ? CreditBatch(num_slots()) : LateCredit(num_slots()))) {
        // A reader that never waits looks at its queue nowhere else.
        Drain();
        error = GiveBack(done);
      }
    }
    if (error != 0) {
      Drain();
      Lost(PostFailed(error));
      // What has arrived can be read though the peer is gone.
      if (options_.role == Role::kWriter) why = loss_;
    }
  }
  return why.empty() ? Status{} : Fail(message, Code::kUnavailable, why);
}

int VerbsChannel::PostReceives(std::uint32_t count) {
  ibv_recv_wr requests[kBatch];
  while (count > 0) {
    const std::uint32_t some = std::min<std::uint32_t>(count, kBatch);
    for (std::uint32_t i = 0; i < some; ++i) {
      requests[i] = ibv_recv_wr{};
      requests[i].wr_id = kReceive;
      requests[i].next = i + 1 < some ? &requests[i + 1] : nullptr;
    }
    ibv_recv_wr* bad = nullptr;
    if (const int error = ibv_post_recv(port_.qp, requests, &bad); error != 0) return error;
    count -= some;
  }
  return 0;
}

int VerbsChannel::PostMessage(const Message& message) {
  SlotHeader* const slot = Slot(next());
  slot->published.store(next() + 1, std::memory_order_relaxed);
  const bool small = IsSmall(message.payload_bytes);
  if (small) slot->check = CheckOf(*slot, message.payload_bytes);
  const auto start = reinterpret_cast<std::uint64_t>(slot);
  const std::uint64_t bytes = sizeof(SlotHeader) + message.payload_bytes;
  ibv_sge part{start, static_cast<std::uint32_t>(bytes), port_.lkey};
  ibv_send_wr request{};
  request.sg_list = &part;
  request.num_sge = 1;
  const bool wakes = !small || Acquire(header()->peer_sleeps) == next() + 1;
  request.opcode = wakes ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
  request.imm_data = htobe32((next() + 1) & kMessages);
  request.send_flags = bytes <= port_.max_inline ? IBV_SEND_INLINE : 0;
  request.wr.rdma.remote_addr = peer_.region + (start - reinterpret_cast<std::uint64_t>(region_->data()));
  request.wr.rdma.rkey = peer_.rkey;
  return Post(request);
}

int VerbsChannel::GiveBack(std::uint64_t count) {
  if (!MayPost()) return 0;
  const int error = PostWord(offsetof(RegionHeader, credit), count, true);
  if (error == 0) credited_ = count;
  return error;
}

int VerbsChannel::PostSleep() {
  if (!AwaitsSmall() || sleeps_for_ == next() + 1) return 0;
  if (!connected_ || !loss_.empty() || PeerIsDone() || !MayPost()) return 0;
  sleeps_for_ = next() + 1;
  return PostWord(offsetof(RegionHeader, peer_sleeps), sleeps_for_, false);
}

int VerbsChannel::PostWord(std::uint64_t offset, std::uint64_t value, bool wake) {
  ibv_sge part{reinterpret_cast<std::uint64_t>(&value), sizeof(value), 0};
  ibv_send_wr request{};
  request.sg_list = &part;
  request.num_sge = 1;
  request.opcode = wake ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
  request.imm_data = htobe32(kWord);
  request.send_flags = IBV_SEND_INLINE;
  request.wr.rdma.remote_addr = peer_.region + offset;
  request.wr.rdma.rkey = peer_.rkey;
  return Post(request);
}

// A completion is asked for often enough that the queue never fills with requests of which none would tell.
int VerbsChannel::Post(ibv_send_wr& request) {
  request.wr_id = posted_ + 1;
  const bool signal = probing_ || request.wr_id - signaled_ >= port_.send_depth / 4;
  if (signal) request.send_flags |= IBV_SEND_SIGNALED;
  ibv_send_wr* bad = nullptr;
  if (const int error = ibv_post_send(port_.qp, &request, &bad); error != 0) return error;
  posted_ = request.wr_id;
  if (signal) signaled_ = posted_;
  return 0;
}

void VerbsChannel::Drain() {
  if (port_.qp == nullptr) return;
  ibv_wc completions[kBatch];
  int count;
  do {
    count = ibv_poll_cq(port_.cq, kBatch, completions);
    for (int i = 0; i < count; ++i) {
      Take(completions[i]);
      owed_receives_ += completions[i].wr_id == kReceive ? 1 : 0;
    }
  } while (count == kBatch);
  if (count < 0) Lost("the completion queue of " + port_.where + " is broken");
  if (owed_receives_ >= kReceiveBatch && loss_.empty()) {
    if (const int error = PostReceives(std::exchange(owed_receives_, 0)); error != 0) Lost(PostFailed(error));
  }
}

void VerbsChannel::Take(const ibv_wc& completion) {
  if (completion.status != IBV_WC_SUCCESS) {
    // The first says why, the rest were flushed.
    if (loss_.empty()) Lost(Explain(completion));
    return;
  }
  if (completion.wr_id != kReceive) {
    completed_ = completion.wr_id;
  } else if (const std::uint32_t said = be32toh(completion.imm_data); said != kWord) {
    const std::uint64_t before = arrived_.load(std::memory_order_relaxed), more = (said - before) & kMessages;
    // Half the numbers lie behind: of messages that memory has shown before.
    if (more <= kMessages / 2) arrived_.store(before + more, std::memory_order_release);
  }
}

// Writes to the peer what it knows already. If nobody is there any more, the NIC says so after its retries.
void VerbsChannel::Probe() {
  const auto now = Clock::now();
  if (port_.qp == nullptr || !connected_ || completed_ < signaled_ || now - last_probe_ < kProbeInterval) return;
  if (!MayPost()) return;
  last_probe_ = now;
  probing_ = true;
  const int error = PostWord(offsetof(RegionHeader, peer_stop), own_stop_.load(), false);
  probing_ = false;
  if (error != 0) Lost(PostFailed(error));
}

void VerbsChannel::Lost(const std::string& why) {
  if (loss_.empty()) loss_ = why;
}

std::string VerbsChannel::Explain(const ibv_wc& completion) const {
  const std::string said = std::string(TheVerbsLibrary().status_text(completion.status)) + ", status " +
                           std::to_string(completion.status) + " of " + port_.where +
                           PortState(completion.status == IBV_WC_LOC_QP_OP_ERR ? kPortTells : kPortPause);
  switch (completion.status) {
    case IBV_WC_RETRY_EXC_ERR:
      return "the peer does not answer any more: its process or host has died, or the link is down (" + said + ")";
    case IBV_WC_REM_ACCESS_ERR:
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_OP_ERR:
      return "the peer's NIC refused to write to its memory (" + said + ")";
    case IBV_WC_WR_FLUSH_ERR:
      return "the queue pair has failed (" + said + ")";
    default:
      return "RDMA failed (" + said + ")";
  }
}

// Empty if the port of this end stays up for so long.
std::string VerbsChannel::PortState(std::chrono::milliseconds patience) const {
  while (true) {
    std::string state;
    std::getline(std::ifstream(port_.state_file), state);
    if (state.empty()) return "";
    if (state.find("ACTIVE") == std::string::npos) return "; its port is " + state;
    if ((patience -= kPortPause) <= patience.zero()) return "";
    std::this_thread::sleep_for(kPortPause);
  }
}

std::string VerbsChannel::PostFailed(int error) const {
  return port_.where + " takes no requests: " + std::generic_category().message(error);
}

void VerbsChannel::Abort() { Stop(kStopAborted); }

// The word only grows, so that the peer sees the stronger of two stops whichever comes last.
void VerbsChannel::Stop(std::uint64_t value) {
  if (getpid() != owner_) return;
  const std::uint64_t before = own_stop_.fetch_or(value, std::memory_order_seq_cst);
  Wake();
  if ((before & value) != 0 || !connected_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (port_.qp == nullptr || !loss_.empty() || PeerIsDone()) return;
  Drain();
  if (!MayPost()) return;
  PostWord(offsetof(RegionHeader, peer_stop), before | value, true);
}

// Who has stopped reads nothing any more, and may have no queue pair.
bool VerbsChannel::PeerIsDone() const { return Acquire(header()->peer_stop) != 0; }

void VerbsChannel::Wake() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = write(wakeup_.get(), &one, sizeof(one));
}

void VerbsChannel::Close() {
  if (getpid() != owner_) return;
  Stop(kStopClosed);
  const auto deadline = Clock::now() + kLinger;
  while (!Quiet() && Clock::now() < deadline) std::this_thread::sleep_for(kLingerLook);
  ibv_qp* qp = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    qp = std::exchange(port_.qp, nullptr);
  }
  TheVerbsEvents().Forget(qp);
  // A sleeper looks at the file of the completion queue. It was woken.
  while (dozing_) std::this_thread::sleep_for(kLingerLook);
}

// Whether all that was sent has arrived, or never will.
bool VerbsChannel::Quiet() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (port_.qp == nullptr || !connected_) return true;
  Drain();
  if (!loss_.empty() || completed_ == posted_ || PeerIsDone()) return true;
  if (completed_ == signaled_) {
    probing_ = true;
    const int error = PostWord(offsetof(RegionHeader, peer_stop), own_stop_.load(), false);
    probing_ = false;
    return error != 0;
  }
  return false;
}

}  // namespace lamina
