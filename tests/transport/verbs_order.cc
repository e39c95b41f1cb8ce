// Channels over RDMA through a NIC that delivers the bytes of a WRITE in no particular order and has no room to spare in its
// queues: no reader may take half a message for a whole one, none that sleeps may be forgotten, and nobody may post more
// than fits. Prints a line for each that holds.
#include <infiniband/verbs.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
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
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "region.h"
#include "verbs_channel.h"
#include "verbs_library.h"

namespace lamina {

// Sleepers that an event of their completion queue has woken.
std::atomic<int> events_taken{0};

// Instead of libibverbs.
const VerbsLibrary& TheVerbsLibrary() {
  static const VerbsLibrary library = [] {
    VerbsLibrary made{};
    made.status_text = [](ibv_wc_status) { return "a status"; };
    made.get_cq_event = [](ibv_comp_channel* channel, ibv_cq**, void**) {
      ++events_taken;
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

constexpr std::uint64_t kSlotBytes = 1024;
constexpr double kTimeout = 30;
constexpr std::uint32_t kSpare = 16;  // _SPARE_REQUESTS in verbs.py
constexpr std::uint64_t kReceive = ~std::uint64_t{0};  // wr_id of receives

// One end's queues, and the thread that takes what it posts to the memory of the other.
class Nic {
 public:
  Nic(unsigned seed, std::uint32_t num_slots)
      : send_depth_(2 * num_slots + kSpare), recv_depth_(num_slots + kSpare), random_(seed) {
    context_.ops.post_send = [](ibv_qp* qp, ibv_send_wr* request, ibv_send_wr**) { return Of(qp).Send(*request); };
    context_.ops.post_recv = [](ibv_qp* qp, ibv_recv_wr* request, ibv_recv_wr**) { return Of(qp).Receive(request); };
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

  VerbsPort Port() { return {&qp_, &cq_, 0, 256, send_depth_, recv_depth_, "a NIC", "/dev/null"}; }

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

  // Whether the next completion is an event.
  bool armed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return armed_;
  }

  std::atomic<int> plain{0};   // messages without an immediate, so far
  std::atomic<int> waking{0};  // and with one
  std::atomic<int> delivered{0};
  std::atomic<int> wrongs{0};  // what a real NIC would have failed for

 private:
  struct Write {
    ibv_send_wr request;
    ibv_sge part;
    std::vector<char> inlined;
  };

  static Nic& Of(ibv_qp* qp) { return *static_cast<Nic*>(qp->qp_context); }
  static Nic& Of(ibv_cq* cq) { return *static_cast<Nic*>(cq->cq_context); }

  int Send(const ibv_send_wr& request) {
    const ibv_sge part = *request.sg_list;
    const auto* const start = reinterpret_cast<const char*>(part.addr);
    const bool inlined = request.send_flags & IBV_SEND_INLINE;
    if (part.length > sizeof(std::uint64_t)) ++(request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM ? waking : plain);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // Room comes back when a completion is polled.
      if (request.wr_id - reaped_ > send_depth_) {
        ++wrongs;
        return ENOMEM;
      }
      posted_.push_back({request, part, inlined ? std::vector<char>(start, start + part.length) : std::vector<char>()});
    }
    changed_.notify_all();
    return 0;
  }

  int Receive(const ibv_recv_wr* request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (; request != nullptr; request = request->next) ++receives_;
    if (receives_ > recv_depth_) ++wrongs;
    return 0;
  }

  int Poll(int room, ibv_wc* to) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int count = 0;
    for (; count < room && !completions_.empty(); ++count) {
      to[count] = completions_.front();
      if (to[count].wr_id != kReceive) reaped_ = to[count].wr_id;
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
    if (wr_id == kReceive && receives_-- == 0) ++wrongs;
    if (completions_.size() == send_depth_ + recv_depth_) ++wrongs;
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
      if (write.part.length > sizeof(std::uint64_t)) ++delivered;
      if (write.request.opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
        peer_->Complete(kReceive, write.request.imm_data);
      }
      if (write.request.send_flags & IBV_SEND_SIGNALED) Complete(write.request.wr_id, 0);
      lock.lock();
      posted_.pop_front();
    }
  }

  // Words that the channel writes alone are never torn; a message is, anywhere.
  void Deliver(const Write& write) {
    char* const to = reinterpret_cast<char*>(write.request.wr.rdma.remote_addr);
    const std::size_t size = write.part.length;
    const char* const from =
        write.inlined.empty() ? reinterpret_cast<const char*>(write.part.addr) : write.inlined.data();
    if (size == sizeof(std::uint64_t)) {
      std::uint64_t word;
      std::memcpy(&word, from, size);
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
        __atomic_store_n(to + at, from[at], __ATOMIC_RELEASE);
      }
    }
  }

  const std::uint32_t send_depth_, recv_depth_;
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
  std::uint64_t reaped_ = 0;  // the last send whose completion was polled
  std::uint32_t receives_ = 0;
  bool armed_ = false, held_ = false, over_ = false;
  std::thread thread_;
};

bool Until(const std::function<bool()>& done) {
  const auto deadline = Clock::now() + std::chrono::seconds(20);
  while (!done() && Clock::now() < deadline) std::this_thread::yield();
  return done();
}

struct Joined {
  explicit Joined(double spin_us, unsigned seed = 1, std::uint32_t num_slots = 4)
      : nics{{seed, num_slots}, {seed + 1, num_slots}} {
    for (int i = 0; i < 2; ++i) {
      const EndOptions options{i == 0 ? Role::kWriter : Role::kReader, "the peer", kTimeout, spin_us, false, true};
      ends[i] = VerbsChannel::Create(options, num_slots, kSlotBytes);
      ends[i]->Open(nics[i].Port());
      nics[i].Join(nics[1 - i]);
    }
    for (int i = 0; i < 2; ++i) {
      ends[i]->Connect({reinterpret_cast<std::uint64_t>(ends[1 - i]->region()), 0, 1, ""});
    }
  }

  // The NICs write to both regions until they are done.
  ~Joined() {
    for (auto& end : ends) end->Close();
    for (auto& nic : nics) nic.Hold(false);
    Until([this] { return nics[0].waiting() + nics[1].waiting() == 0; });
  }

  VerbsChannel& writer() { return *ends[0]; }
  VerbsChannel& reader() { return *ends[1]; }
  // For what message the writer knows the reader to sleep.
  std::uint64_t told() {
    return __atomic_load_n(&reinterpret_cast<RegionHeader*>(ends[0]->region())->peer_sleeps, __ATOMIC_ACQUIRE);
  }
  bool right() const { return nics[0].wrongs == 0 && nics[1].wrongs == 0; }

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

// Messages of every size, or only small ones, in a ring of so many slots. Who is `behind` never has to wait for one.
bool Traffic(double spin_us, std::uint32_t num_slots, int count, int num_sizes = 6, bool behind = false) {
  Joined joined(spin_us, num_slots, num_slots);
  const auto size_of = [&](int i) { return kLine * ((i * 7 + num_slots) % num_sizes); };
  bool sent = true, received = true;
  std::thread writing([&] {
    for (int i = 0; i < count && sent; ++i) sent = Send(joined.writer(), i, size_of(i));
  });
  for (int i = 0; i < count && received; ++i) {
    if (behind) Until([&] { return joined.nics[0].delivered > i; });
    received = Recv(joined.reader(), i, size_of(i));
  }
  if (!received) joined.reader().Abort();
  writing.join();
  return sent && received && joined.nics[0].plain > 0 && joined.right();
}

bool WholeMessagesOnly() { return Traffic(1000, 4, 20000); }
bool Sleepers() { return Traffic(0, 4, 3000); }
bool RingsOfFewSlots() { return Traffic(1000, 1, 2000) && Traffic(1000, 2, 2000) && Traffic(0, 3, 2000); }
bool ReaderBehind() { return Traffic(1000, 4, 2000, 3, true); }

// Who sleeps is woken by an event; who polls needs none.
bool SleeperIsWoken() {
  Joined joined(0);
  constexpr int kTimes = 10;
  bool good = true;
  const int before = events_taken;
  for (int i = 0; i < kTimes && good; ++i) {
    bool received = false;
    std::thread reading([&] { received = Recv(joined.reader(), i, kLine); });
    good = Until([&] { return joined.told() == i + 1u; });
    // Its naps get longer, so that hardly any ends just when the message comes.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    good = Send(joined.writer(), i, kLine) && good;
    reading.join();
    good = good && received && joined.nics[0].waking == i + 1 && joined.nics[0].plain == 0;
  }
  return good && events_taken - before > kTimes / 2 && joined.right();
}

bool PollerIsNot() {
  Joined joined(1e7);
  for (int i = 0; i < 20; ++i) {
    if (!Send(joined.writer(), i, kLine) || !Recv(joined.reader(), i, kLine)) return false;
  }
  return joined.nics[0].waking == 0 && joined.nics[0].plain == 20 && joined.right();
}

// The reader has said that it sleeps, but the writer does not know yet and sends without an immediate. The reader has not
// waited long, so neither does it nap.
bool LateWordIsNoHarm() {
  std::vector<Clock::duration> waits;
  for (unsigned turn = 0; turn < 9; ++turn) {
    Joined joined(0, turn);
    bool received = false;
    joined.nics[1].Hold(true);
    std::thread reading([&] { received = Recv(joined.reader(), 0, kLine); });
    const bool said = Until([&] { return joined.nics[1].waiting() > 0; });
    const auto start = Clock::now();
    const bool sent = Send(joined.writer(), 0, kLine);
    reading.join();
    waits.push_back(Clock::now() - start);
    if (!said || !sent || !received || joined.nics[0].plain != 1 || joined.nics[0].waking != 0) return false;
  }
  std::sort(waits.begin(), waits.end());
  return waits[waits.size() / 2] < kSlice / 2;
}

// What a reader awaits says whether it need tell anything: a large message always wakes.
bool LargeMessageWakesUntold() {
  Joined joined(0);
  bool received = false;
  std::thread reading([&] { received = Recv(joined.reader(), 0, kSlotBytes); });
  const bool slept = Until([&] { return joined.nics[1].armed(); });
  const bool sent = Send(joined.writer(), 0, kSlotBytes);
  reading.join();
  const bool quiet = Until([&] { return joined.nics[1].waiting() == 0; });
  return slept && sent && received && quiet && joined.nics[0].waking == 1 && joined.told() == 0;
}

// What was sent before a close is received, all of it, and then the close is seen.
bool ClosedInFlight() {
  for (unsigned turn = 0; turn < 50; ++turn) {
    Joined joined(1000, turn);
    std::thread writing([&] {
      for (int i = 0; i < 3; ++i) Send(joined.writer(), i, kLine * (i + turn % 2 * 3));
      joined.writer().Close();
    });
    bool good = true;
    for (int i = 0; i < 3 && good; ++i) good = Recv(joined.reader(), i, kLine * (i + turn % 2 * 3));
    const char* payload = nullptr;
    const Status over = joined.reader().Peek(Describe(3, kLine), &payload);
    writing.join();
    if (!good || over.code != Code::kUnavailable || !joined.right()) return false;
  }
  return true;
}

// A message of another size than the awaited one is an error, whichever of them is small.
bool OtherSizeIsSaid() {
  for (const bool small : {false, true}) {
    Joined joined(0);
    std::thread writing([&] { Send(joined.writer(), 0, small ? kLine : kSlotBytes); });
    const char* payload = nullptr;
    const Status status = joined.reader().Peek(Describe(0, small ? kSlotBytes : kLine), &payload);
    writing.join();
    if (status.code != Code::kFailedPrecondition || status.text.find("payload bytes") == std::string::npos) return false;
  }
  return true;
}

}  // namespace

int main() {
#define SAY(check) std::printf("%s: %s\n", #check, check() ? "good" : "bad")
  std::setbuf(stdout, nullptr);
  SAY(WholeMessagesOnly);
  SAY(Sleepers);
  SAY(RingsOfFewSlots);
  SAY(ReaderBehind);
  SAY(SleeperIsWoken);
  SAY(PollerIsNot);
  SAY(LateWordIsNoHarm);
  SAY(LargeMessageWakesUntold);
  SAY(ClosedInFlight);
  SAY(OtherSizeIsSaid);
}
