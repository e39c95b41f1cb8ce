#include "shm_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>

#include "system.h"

namespace lamina {
namespace {

// How long a sleep is on a ring whose other end may be a GPU.
constexpr Nanoseconds kShortestNap = std::chrono::microseconds(5);
constexpr Nanoseconds kLongestNap = std::chrono::microseconds(200);
constexpr char kDirectory[] = "/dev/shm";

// Linux adds up to 50 us to every sleep of a thread, to save power. Here it may add 1 us.
void WakeInTime() {
  static thread_local bool done = false;
  if (!done) prctl(PR_SET_TIMERSLACK, 1000);
  done = true;
}

std::string RoleName(Role role) { return role == Role::kWriter ? "writer" : "reader"; }

// O_TMPFILE makes a file that never has a name, so that nothing stays behind however the process ends.
int OpenUnnamed() {
  const int fd = open(kDirectory, O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) ThrowErrno(errno, std::string("cannot make a shared memory file in ") + kDirectory);
  return fd;
}

// Takes the pages now: a full /dev/shm must be an error here and not SIGBUS at the first message.
void ReservePages(int fd, std::uint64_t bytes) {
  int error;
  do {
    error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == 0) return;
  close(fd);
  ThrowErrno(error, "cannot reserve " + std::to_string(bytes) + " bytes of shared memory in " + kDirectory);
}

std::uint64_t FileBytes(int fd) {
  struct stat status;
  return fstat(fd, &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
}

void RequireEqual(const char* what, std::uint64_t expected, std::uint64_t got, const std::string& path) {
  if (expected == got) return;
  throw std::invalid_argument("the ring at " + path + " has another " + what + ": expected " +
                              std::to_string(expected) + ", got " + std::to_string(got));
}

void TakeRole(RingHeader* ring, Role role, const std::string& path) {
  std::uint32_t owner = 0;
  const auto pid = static_cast<std::uint32_t>(getpid());
  if (ring->pids[static_cast<int>(role)].compare_exchange_strong(owner, pid)) return;
  throw std::invalid_argument("the " + RoleName(role) + " of the ring at " + path + " is already taken: expected no " +
                              RoleName(role) + ", got process " + std::to_string(owner));
}

}  // namespace

// MAP_POPULATE: the first messages should not pay for page faults.
Mapping::Mapping(int fd, std::uint64_t bytes)
    : fd_(fd),
      bytes_(bytes),
      data_(static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0))) {
  if (data_ != MAP_FAILED) return;
  const int error = errno;
  close(fd_);
  ThrowErrno(error, "cannot map " + std::to_string(bytes) + " bytes of shared memory");
}

Mapping::~Mapping() {
  munmap(data_, bytes_);
  close(fd_);
}

ShmChannel::ShmChannel(EndOptions options, std::unique_ptr<Mapping> mapping, std::uint32_t num_slots,
                       std::uint64_t slot_bytes)
    : ChannelEnd(std::move(options), mapping->data() + sizeof(RingHeader), num_slots, slot_bytes),
      mapping_(std::move(mapping)),
      ring_(reinterpret_cast<RingHeader*>(mapping_->data())) {}

ShmChannel::~ShmChannel() {
  Close();
  if (peer_pidfd_ >= 0) close(peer_pidfd_);
}

std::shared_ptr<ShmChannel> ShmChannel::Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes) {
  slot_bytes = AlignToLine(slot_bytes);
  const std::uint64_t bytes = RingBytes(num_slots, slot_bytes);
  const int fd = OpenUnnamed();
  ReservePages(fd, bytes);
  auto mapping = std::make_unique<Mapping>(fd, bytes);
  auto* ring = new (mapping->data()) RingHeader{};
  ring->version = kRingVersion;
  ring->num_slots = num_slots;
  ring->slot_bytes = slot_bytes;
  ring->polled = options.polled ? 1 : 0;
  ring->magic = kRingMagic;
  ring->pids[static_cast<int>(options.role)] = static_cast<std::uint32_t>(getpid());
  return std::shared_ptr<ShmChannel>(new ShmChannel(std::move(options), std::move(mapping), num_slots, slot_bytes));
}

std::shared_ptr<ShmChannel> ShmChannel::Attach(EndOptions options, const std::string& path, std::uint32_t num_slots,
                                               std::uint64_t slot_bytes) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) ThrowErrno(errno, "cannot open the ring of " + options.peer + " at " + path);
  const std::uint64_t bytes = RingBytes(num_slots, slot_bytes);
  if (const std::uint64_t got = FileBytes(fd); got != bytes) {
    close(fd);
    RequireEqual("size in bytes", bytes, got, path);
  }
  auto mapping = std::make_unique<Mapping>(fd, bytes);
  auto* ring = reinterpret_cast<RingHeader*>(mapping->data());
  RequireEqual("magic number", kRingMagic, ring->magic, path);
  RequireEqual("version", kRingVersion, ring->version, path);
  RequireEqual("number of slots", num_slots, ring->num_slots, path);
  RequireEqual("slot size in bytes", slot_bytes, ring->slot_bytes, path);
  TakeRole(ring, options.role, path);
  return std::shared_ptr<ShmChannel>(new ShmChannel(std::move(options), std::move(mapping), num_slots, slot_bytes));
}

// seq_cst, so that either the peer sees the new sequence before it sleeps or we see that it waits.
Status ShmChannel::Advance(const Message&) {
  std::atomic<std::uint64_t>& sequence =
      options_.role == Role::kWriter ? Slot(next())->published : ring_->read_seq;
  sequence.store(next() + 1, std::memory_order_seq_cst);
  const Role peer = PeerRole();
  if (ring_->sleep[static_cast<int>(peer)].waiting.load(std::memory_order_seq_cst) != 0) Wake(peer);
  return {};
}

void ShmChannel::Wake(Role role) {
  SleepWord& sleep = ring_->sleep[static_cast<int>(role)];
  sleep.wakeups.fetch_add(1, std::memory_order_seq_cst);
  FutexWake(sleep.wakeups);
}

// The reader: is there anything newer in the slot than what it held one round ago?
bool ShmChannel::Ready() {
  if (options_.role == Role::kReader) {
    const std::uint64_t before = next() < num_slots() ? 0 : next() - num_slots() + 1;
    return Slot(next())->published.load(std::memory_order_seq_cst) != before;
  }
  if (next() < read_seen_ + num_slots()) return true;
  read_seen_ = ring_->read_seq.load(std::memory_order_seq_cst);
  return next() < read_seen_ + num_slots();
}

std::uint32_t ShmChannel::stop() { return ring_->stop.load(std::memory_order_seq_cst); }

std::string ShmChannel::PeerLoss() { return PeerDied() ? kPeerDied : ""; }

void ShmChannel::BeginDoze() {
  SleepWord& sleep = ring_->sleep[static_cast<int>(options_.role)];
  wakeups_seen_ = sleep.wakeups.load(std::memory_order_seq_cst);
  sleep.waiting.store(1, std::memory_order_seq_cst);
}

void ShmChannel::EndDoze() {
  ring_->sleep[static_cast<int>(options_.role)].waiting.store(0, std::memory_order_relaxed);
}

// Where a GPU may be at the other end, which wakes nobody, the sleep is short at first and grows with what was waited
// already, so that looking costs little time and little of a core.
void ShmChannel::Doze(Nanoseconds waited, Nanoseconds left) {
  Nanoseconds longest = kSlice;
  if (ring_->polled) {
    WakeInTime();
    longest = std::clamp(waited / 8, kShortestNap, kLongestNap);
  }
  FutexWait(ring_->sleep[static_cast<int>(options_.role)].wakeups, wakeups_seen_, std::min(longest, left));
}

bool ShmChannel::PeerDied() {
  if (peer_gone_) return true;
  const std::uint32_t pid = peer_pid();
  if (pid == 0) return false;
  if (peer_pidfd_ < 0) {
    peer_pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (peer_pidfd_ < 0) return peer_gone_ = errno == ESRCH;
  }
  pollfd poller{peer_pidfd_, POLLIN, 0};
  return peer_gone_ = poll(&poller, 1, 0) > 0;
}

void ShmChannel::Abort() { Stop(AbortedBit(options_.role)); }

void ShmChannel::Close() { Stop(ClosedBit(options_.role)); }

// A forked child shares the ring; its exit must not end the channel of its parent.
void ShmChannel::Stop(std::uint32_t reason) {
  if (getpid() != owner_) return;
  ring_->stop.fetch_or(reason, std::memory_order_seq_cst);
  Wake(Role::kWriter);
  Wake(Role::kReader);
}

std::uint32_t ShmChannel::peer_pid() const {
  return ring_->pids[static_cast<int>(PeerRole())].load(std::memory_order_acquire);
}

std::string ShmChannel::path() const {
  return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(mapping_->fd());
}

}  // namespace lamina
