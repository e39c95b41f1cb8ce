// Channels over RDMA through a NIC that delivers the bytes of a WRITE in no particular order: no reader may take half a
// message for a whole one, and none that sleeps may be forgotten. Prints a line for each that holds.
#include <infiniband/verbs.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "region.h"
#include "verbs_channel.h"
#include "verbs_library.h"

namespace lamina {

// Instead of libibverbs.
const VerbsLibrary& TheVerbsLibrary() {
  static const VerbsLibrary library = [] {
    VerbsLibrary made{};
    made.status_text = [](ibv_wc_status) { return "a status"; };
    made.get_cq_event = [](ibv_comp_channel* channel, ibv_cq**, void**) {
      std::uint64_t count;
      return read(channel->fd, &count, sizeof(count)) == sizeof(count) ? 0 : -1;
    };
    made.ack_cq_events = [](ibv_cq*, unsigned) {};
    return made;
  }();
  return library;
}

}  // namespace lamina

namespace {

using namespace lamina;

constexpr std::uint32_t kSlots = 4;
constexpr std::uint64_t kSlotBytes = 1024;
constexpr double kTimeout = 30;

// One end's queues, and the thread that takes what it posts to the memory of the other.
class Nic {
 public:
  explicit Nic(unsigned seed) : random_(seed) {
    context_.ops.post_send = [](ibv_qp* qp, ibv_send_wr* request, ibv_send_wr**) { return Of(qp).Send(*request); };
    context_.ops.post_recv = [](ibv_qp*, ibv_recv_wr*, ibv_recv_wr**) { return 0; };
    context_.ops.poll_cq = [](ibv_cq* cq, int room, ibv_wc* to) { return Of(cq).Poll(room, to); };
    context_.ops.req_notify_cq = [](ibv_cq* cq, int) { return Of(cq).Arm(); };
    context_.async_fd = eventfd(0, EFD_NONBLOCK);
    events_.fd = eventfd(0, EFD_NONBLOCK);
    cq_.context = qp_.context = &context_;
    cq_.channel = &events_;
    cq_.cq_context = qp_.qp_context = this;
  }

  ~Nic() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  VerbsPort Port() { return {&qp_, &cq_, 0, 256, 2 * kSlots + 16, kSlots + 16, "a NIC", "/dev/null"}; }

  void Join(Nic& peer) {
    peer_ = &peer;
    thread_ = std::thread([this] { Run(); });
  }

  // While held, what is posted stays here.
  void Hold(bool held) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      held_ = held;
    }
    changed_.notify_all();
  }

  std::size_t waiting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return posted_.size();
  }

  std::atomic<int> plain{0};   // messages without an immediate, so far
  std::atomic<int> waking{0};  // and with one

 private:
  struct Write {
    ibv_send_wr request;
    std::vector<char> bytes;
  };

  static Nic& Of(ibv_qp* qp) { return *static_cast<Nic*>(qp->qp_context); }
  static Nic& Of(ibv_cq* cq) { return *static_cast<Nic*>(cq->cq_context); }

  int Send(const ibv_send_wr& request) {
    const auto* const start = reinterpret_cast<const char*>(request.sg_list->addr);
    if (request.sg_list->length > sizeof(std::uint64_t)) {
      ++(request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM ? waking : plain);
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      posted_.push_back({request, {start, start + request.sg_list->length}});
    }
    changed_.notify_all();
    return 0;
  }

  int Poll(int room, ibv_wc* to) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int count = 0;
    for (; count < room && !completions_.empty(); ++count) {
      to[count] = completions_.front();
      completions_.pop_front();
    }
    return count;
  }

  int Arm() {
    const std::lock_guard<std::mutex> lock(mutex_);
    armed_ = true;
    return 0;
  }

  void Complete(std::uint64_t wr_id, std::uint32_t immediate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ibv_wc completion{};
    completion.wr_id = wr_id;
    completion.imm_data = immediate;
    completions_.push_back(completion);
    const std::uint64_t one = 1;
    if (std::exchange(armed_, false)) [[maybe_unused]] const auto written = write(events_.fd, &one, sizeof(one));
  }

  void Run() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return over_ || (!held_ && !posted_.empty()); });
      if (over_) return;
      const Write write = posted_.front();
      lock.unlock();
      Deliver(write);
      if (write.request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
        peer_->Complete(~std::uint64_t{0}, write.request.imm_data);
      }
      if (write.request.send_flags & IBV_SEND_SIGNALED) Complete(write.request.wr_id, 0);
      lock.lock();
      posted_.pop_front();
    }
  }

  // Words that the channel writes alone are never torn; a message is, anywhere.
  void Deliver(const Write& write) {
    char* const to = reinterpret_cast<char*>(write.request.wr.rdma.remote_addr);
    const std::size_t size = write.bytes.size();
    if (size == sizeof(std::uint64_t)) {
      std::uint64_t word;
      std::memcpy(&word, write.bytes.data(), size);
      __atomic_store_n(reinterpret_cast<std::uint64_t*>(to), word, __ATOMIC_RELEASE);
      return;
    }
    const std::size_t piece = std::size_t{1} << random_() % 6;
    std::vector<std::size_t> starts((size + piece - 1) / piece);
    for (std::size_t i = 0; i < starts.size(); ++i) starts[i] = i * piece;
    std::shuffle(starts.begin(), starts.end(), random_);
    const std::size_t pause = random_() % (2 * starts.size());
    for (std::size_t i = 0; i < starts.size(); ++i) {
      if (i == pause) std::this_thread::yield();
      for (std::size_t at = starts[i]; at < std::min(starts[i] + piece, size); ++at) {
        __atomic_store_n(to + at, write.bytes[at], __ATOMIC_RELEASE);
      }
    }
  }

  std::mt19937 random_;
  ibv_context context_{};
  ibv_comp_channel events_{};
  ibv_cq cq_{};
  ibv_qp qp_{};
  Nic* peer_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Write> posted_;
  std::deque<ibv_wc> completions_;
  bool armed_ = false, held_ = false, over_ = false;
  std::thread thread_;
};

struct Joined {
  explicit Joined(double spin_us, unsigned seed = 1) : nics{Nic(seed), Nic(seed + 1)} {
    for (int i = 0; i < 2; ++i) {
      const EndOptions options{i == 0 ? Role::kWriter : Role::kReader, "the peer", kTimeout, spin_us, false, true};
      ends[i] = VerbsChannel::Create(options, kSlots, kSlotBytes);
      ends[i]->Open(nics[i].Port());
      nics[i].Join(nics[1 - i]);
    }
    for (int i = 0; i < 2; ++i) {
      ends[i]->Connect({reinterpret_cast<std::uint64_t>(ends[1 - i]->region()), 0, 1, ""});
    }
  }
  ~Joined() {
    for (auto& end : ends) end->Close();
  }

  VerbsChannel& writer() { return *ends[0]; }
  VerbsChannel& reader() { return *ends[1]; }
  const RegionHeader& told() { return *reinterpret_cast<const RegionHeader*>(ends[0]->region()); }

  Nic nics[2];
  std::shared_ptr<VerbsChannel> ends[2];
};

Message Describe(int i, std::uint64_t payload_bytes) {
  Message message;
  message.step = i;
  message.num_tensors = 1;
  message.payload_bytes = payload_bytes;
  return message;
}

// What differs from one message to the next is now and then the top bit of words only, or nothing at all.
std::uint64_t Word(int i, std::uint64_t at) {
  return i % 3 == 0 ? 0 : i % 3 == 1 ? std::uint64_t{1} << 63 : i * 0x9e3779b97f4a7c15 + at;
}

bool Send(VerbsChannel& channel, int i, std::uint64_t payload_bytes) {
  char* payload = nullptr;
  const Status status = channel.Reserve(Describe(i, payload_bytes), &payload);
  if (!status.ok()) std::printf("%s\n", status.text.c_str());
  if (!status.ok()) return false;
  for (std::uint64_t at = 0; at < payload_bytes / 8; ++at) reinterpret_cast<std::uint64_t*>(payload)[at] = Word(i, at);
  return channel.Publish().ok();
}

bool Recv(VerbsChannel& channel, int i, std::uint64_t payload_bytes) {
  const char* payload = nullptr;
  const Status status = channel.Peek(Describe(i, payload_bytes), &payload);
  if (!status.ok()) std::printf("%s\n", status.text.c_str());
  if (!status.ok()) return false;
  bool same = true;
  for (std::uint64_t at = 0; at < payload_bytes / 8; ++at) {
    same &= reinterpret_cast<const std::uint64_t*>(payload)[at] == Word(i, at);
  }
  if (!same) std::printf("message %d is not what was sent\n", i);
  return channel.Release().ok() && same;
}

bool Until(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!done() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  return done();
}

// Messages of every size, with a reader that mostly polls (spin_us > 0) or always sleeps.
bool Traffic(double spin_us, unsigned seed, int count) {
  Joined joined(spin_us, seed);
  const auto size_of = [seed](int i) { return kLine * ((i * 7 + seed) % 6); };
  bool sent = true, received = true;
  std::thread writing([&] {
    for (int i = 0; i < count && sent; ++i) sent = Send(joined.writer(), i, size_of(i));
  });
  for (int i = 0; i < count && received; ++i) received = Recv(joined.reader(), i, size_of(i));
  if (!received) joined.reader().Abort();
  writing.join();
  return sent && received && joined.nics[0].plain > 0 && joined.nics[0].waking > 0;
}

bool WholeMessagesOnly() { return Traffic(1000, 1, 20000); }
bool Sleepers() { return Traffic(0, 2, 3000); }

// Who sleeps is woken by an immediate; who polls needs none.
bool SleeperIsWoken() {
  Joined joined(0);
  bool good = true;
  for (int i = 0; i < 20 && good; ++i) {
    bool received = false;
    std::thread reading([&] { received = Recv(joined.reader(), i, kLine); });
    good = Until([&] { return __atomic_load_n(&joined.told().peer_sleeps, __ATOMIC_ACQUIRE) == i + 1u; });
    good = Send(joined.writer(), i, kLine) && good;
    reading.join();
    good = good && received && joined.nics[0].waking == i + 1 && joined.nics[0].plain == 0;
  }
  return good;
}

bool PollerIsNot() {
  Joined joined(1e7);
  for (int i = 0; i < 20; ++i) {
    if (!Send(joined.writer(), i, kLine) || !Recv(joined.reader(), i, kLine)) return false;
  }
  return joined.nics[0].waking == 0 && joined.nics[0].plain == 20;
}

// The reader has said that it sleeps, but the writer does not know yet and sends without an immediate.
bool LateWordIsNoHarm() {
  Joined joined(0);
  bool received = false;
  joined.nics[1].Hold(true);
  std::thread reading([&] { received = Recv(joined.reader(), 0, kLine); });
  const bool said = Until([&] { return joined.nics[1].waiting() > 0; });
  const bool sent = Send(joined.writer(), 0, kLine);
  reading.join();
  const bool plain = joined.nics[0].plain == 1 && joined.nics[0].waking == 0;
  joined.nics[1].Hold(false);
  return said && sent && received && plain;
}

// What a reader awaits says whether it need tell anything: a large message always wakes.
bool LargeMessageWakesUntold() {
  Joined joined(0);
  bool received = false;
  std::thread reading([&] { received = Recv(joined.reader(), 0, kSlotBytes); });
  const bool sent = Send(joined.writer(), 0, kSlotBytes);
  reading.join();
  return sent && received && joined.nics[0].waking == 1 && joined.told().peer_sleeps == 0;
}

}  // namespace

int main() {
#define SAY(check) std::printf("%s: %s\n", #check, check() ? "good" : "bad")
  SAY(WholeMessagesOnly);
  SAY(Sleepers);
  SAY(SleeperIsWoken);
  SAY(PollerIsNot);
  SAY(LateWordIsNoHarm);
  SAY(LargeMessageWakesUntold);
}
