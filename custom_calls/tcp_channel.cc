#include "tcp_channel.h"

#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>

#include "region.h"
#include "tcp_accept.h"

namespace lamina {
namespace {

using std::chrono::milliseconds;

// How long an end that has stopped goes on with what is not delivered yet.
constexpr milliseconds kLinger{2000};
// How often the pump looks whether what was sent is acknowledged: always, and by an end that has stopped.
constexpr milliseconds kLook{500};
constexpr milliseconds kLookStopped{1};
// A host that acknowledges nothing for so long is lost.
constexpr milliseconds kSilence{4000};

void SetOption(int socket, int level, int name, int value) { setsockopt(socket, level, name, &value, sizeof(value)); }

// An idle connection is looked after by the kernel: it asks the peer's after a second, and gives up after three more.
// Buffers are left to it too, as it fits them to the connection.
void Tune(int socket) {
  SetOption(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPIDLE, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPINTVL, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
}

// Keepalive ends while something is on the way. TCP_USER_TIMEOUT would look after that, but it also ends a connection
// whose peer is only stopped and so has no room: its kernel answers then, if it is asked.
bool Answers(int socket) {
  tcp_info info{};
  socklen_t bytes = sizeof(info);
  if (getsockopt(socket, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return true;
  const bool asked_again = std::max(info.tcpi_retransmits, info.tcpi_probes) >= 2;
  return !asked_again || milliseconds(info.tcpi_last_ack_recv) < kSilence;
}

// The kernel of the peer has all that this one was given.
bool Acknowledged(int socket) {
  int left = 0;
  return ioctl(socket, SIOCOUTQ, &left) == 0 && left == 0;
}

std::string LostBy(int error) { return "the connection was lost: " + std::generic_category().message(error); }

// What is left of `parts` behind their first `bytes`.
void Skip(iovec (&parts)[2], std::size_t bytes) {
  for (iovec& part : parts) {
    const std::size_t skipped = std::min(bytes, part.iov_len);
    part.iov_base = static_cast<char*>(part.iov_base) + skipped;
    part.iov_len -= skipped;
    bytes -= skipped;
  }
}

std::uint64_t RoomFor(std::uint32_t num_slots, std::uint64_t slot_bytes) {
  std::uint64_t bytes;
  if (__builtin_mul_overflow(SlotStride(slot_bytes), num_slots, &bytes)) return ~std::uint64_t{0};
  return bytes;
}

std::string Numbers(std::uint64_t expected, std::uint64_t got) {
  return "expected " + std::to_string(expected) + ", got " + std::to_string(got);
}

}  // namespace

TcpChannel::Memory::Memory(std::uint64_t bytes)
    : bytes_(bytes),
      data_(static_cast<char*>(
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0))) {
  if (data_ == MAP_FAILED) ThrowErrno(errno, "cannot reserve " + std::to_string(bytes) + " bytes of memory for slots");
}

TcpChannel::Memory::~Memory() { munmap(data_, bytes_); }

TcpChannel::TcpChannel(EndOptions options, std::unique_ptr<Memory> memory, std::uint32_t num_slots,
                       std::uint64_t slot_bytes)
    : ChannelEnd(std::move(options), memory->data(), num_slots, slot_bytes),
      memory_(std::move(memory)),
      kick_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!kick_.open()) ThrowErrno(errno, "cannot make an eventfd");
}

std::shared_ptr<TcpChannel> TcpChannel::Create(EndOptions options, std::uint32_t num_slots, std::uint64_t slot_bytes) {
  slot_bytes = AlignToLine(slot_bytes);
  auto memory = std::make_unique<Memory>(RoomFor(num_slots, slot_bytes));
  return std::shared_ptr<TcpChannel>(new TcpChannel(std::move(options), std::move(memory), num_slots, slot_bytes));
}

void TcpChannel::Accept(UniqueFd listener, const Token& token, TcpPeer peer) {
  Start(std::move(listener), token, UniqueFd(), std::move(peer));
}

void TcpChannel::Connect(UniqueFd socket, TcpPeer peer) {
  Start(UniqueFd(), {}, std::move(socket), std::move(peer));
}

void TcpChannel::Start(UniqueFd listener, const Token& token, UniqueFd socket, TcpPeer peer) {
  peer_host_ = std::move(peer.host);
  peer_pid_.store(peer.pid, std::memory_order_release);
  const std::lock_guard<std::mutex> lock(mutex_);
  socket_ = std::move(socket);
  std::thread([self = shared_from_this(), listener = std::move(listener), token]() mutable {
    self->Run(std::move(listener), token);
  }).detach();
  running_ = true;
}

void TcpChannel::Run(UniqueFd listener, const Token& token) {
  pthread_setname_np(pthread_self(), "lamina-tcp");
  try {
    if (!socket_.open()) {
      UniqueFd socket = AcceptPeer(listener.get(), kick_.get(), token, [this] { return StoppedHere(); });
      listener.Reset();
      const std::lock_guard<std::mutex> lock(mutex_);
      socket_ = std::move(socket);
    }
    if (socket_.open()) Pump();
  } catch (const std::system_error& error) {
    Lose(error.what());
  }
  Finish();
}

void TcpChannel::Pump() {
  Tune(socket_.get());
  while (true) {
    pollfd polled[] = {{socket_.get(), POLLIN, 0}, {kick_.get(), POLLIN, 0}};
    int pause;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Flush();
      pause = Pause();
      if (full_) polled[0].events |= POLLOUT;
    }
    if (pause < 0) return;
    poll(polled, 2, pause);
    if (polled[1].revents != 0) {
      eventfd_t kicks;
      eventfd_read(kick_.get(), &kicks);
    }
    if (polled[0].revents & POLLOUT) {
      const std::lock_guard<std::mutex> lock(mutex_);
      full_ = false;
    }
    if ((polled[0].revents & ~POLLOUT) != 0 && !Receive()) return;
    if (!LinkLives()) return;
  }
}

// A forked child may hold the connection too, so it has to be shut down and not only closed.
void TcpChannel::Finish() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (socket_.open()) shutdown(socket_.get(), SHUT_RDWR);
    socket_.Reset();
    running_ = false;
  }
  changed_.notify_all();
  Wake();
}

// Milliseconds that the pump may sleep; negative if it is to end.
int TcpChannel::Pause() {
  if (!StoppedHere()) return static_cast<int>(kLook.count());
  const bool all_sent = send_error_ != 0 || (said_farewell_ && Unsent() == 0);
  if (all_sent && !shut_) {
    shutdown(socket_.get(), SHUT_WR);
    shut_ = true;
  }
  if (all_sent && !delivered_ && Acknowledged(socket_.get())) {
    delivered_ = true;
    changed_.notify_all();
  }
  const auto left = std::chrono::ceil<milliseconds>(stopped_at_ + kLinger - Clock::now());
  if (left <= left.zero()) return -1;
  return static_cast<int>(std::min(left, all_sent && !delivered_ ? kLookStopped : kLook).count());
}

void TcpChannel::Kick() { eventfd_write(kick_.get(), 1); }

void TcpChannel::Push() {
  const bool waits = full_;
  Flush();
  if (full_ && !waits) Kick();
}

void TcpChannel::Flush() {
  while (socket_.open() && !full_ && send_error_ == 0 && (Unsent() > 0 || NextFrame())) {
    msghdr message{};
    message.msg_iov = unsent_;
    message.msg_iovlen = 2;
    const ssize_t sent = sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) {
      Skip(unsent_, static_cast<std::size_t>(sent));
      if (Unsent() == 0) told_ = sending_.count + (sending_.type == FrameType::kMessage ? 1 : 0);
    } else if (errno == EAGAIN) {
      full_ = true;
    } else if (errno != EINTR) {
      send_error_ = errno;
    }
  }
}

bool TcpChannel::NextFrame() {
  sending_ = Frame{};
  if (role() == Role::kWriter && told_ < finished_) {
    SlotHeader* const slot = Slot(told_);
    sending_.type = FrameType::kMessage;
    sending_.count = told_;
    sending_.message = slot->message;
    unsent_[1] = {slot + 1, slot->message.payload_bytes};
  } else if (role() == Role::kReader && finished_ - told_ >= CreditBatch(num_slots())) {
    sending_.type = FrameType::kCredit;
    sending_.count = finished_;
  } else if (StoppedHere() && !said_farewell_) {
    sending_.type = stop() & AbortedBit(role()) ? FrameType::kAborted : FrameType::kClosed;
    sending_.count = finished_;
    said_farewell_ = true;
  } else {
    return false;
  }
  unsent_[0] = {&sending_, sizeof(sending_)};
  return true;
}

// Payload and the header behind it in one go.
bool TcpChannel::Receive() {
  if (StoppedHere()) return Discard();
  while (true) {
    char* const header = reinterpret_cast<char*>(&received_);
    iovec parts[] = {{payload_, payload_left_}, {header + header_bytes_, sizeof(received_) - header_bytes_}};
    const std::size_t wanted = parts[0].iov_len + parts[1].iov_len;
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    const ssize_t result = recvmsg(socket_.get(), &message, MSG_DONTWAIT);
    if (result < 0 && errno == EINTR) continue;
    if (result < 0 && errno == EAGAIN) return true;
    if (result <= 0) return Ended(result == 0 ? 0 : errno);
    const auto bytes = static_cast<std::size_t>(result);
    const std::size_t of_payload = std::min<std::size_t>(bytes, payload_left_);
    payload_ += of_payload;
    payload_left_ -= of_payload;
    if (of_payload != 0 && payload_left_ == 0) Arrived();
    header_bytes_ += bytes - of_payload;
    if (header_bytes_ == sizeof(received_)) {
      header_bytes_ = 0;
      if (!Handle(received_)) return false;
    }
    if (bytes < wanted) return true;
  }
}

// Closing a socket that holds something unread would take back what is on its way to the peer.
bool TcpChannel::Discard() {
  while (true) {
    const ssize_t result = recv(socket_.get(), nullptr, 1 << 20, MSG_DONTWAIT | MSG_TRUNC);
    if (result > 0 || (result < 0 && errno == EINTR)) continue;
    return result < 0 && errno == EAGAIN;
  }
}

bool TcpChannel::Handle(const Frame& frame) {
  if (frame.magic != kFrameMagic) {
    return Malformed("a frame begins with " + std::to_string(frame.magic) + " instead of " +
                     std::to_string(kFrameMagic));
  }
  const FrameType data = role() == Role::kReader ? FrameType::kMessage : FrameType::kCredit;
  if (frame.type != data && frame.type != FrameType::kClosed && frame.type != FrameType::kAborted) {
    return Malformed("a frame of a type that is not for a " + std::string(role() == Role::kReader ? "reader" : "writer") +
                     ": " + std::to_string(static_cast<std::uint32_t>(frame.type)));
  }
  if (frame.type == FrameType::kMessage) return HandleMessage(frame);
  if (!HandleCount(frame)) return false;
  if (frame.type != FrameType::kCredit) {
    const Role peer = PeerRole();
    stop_.fetch_or(frame.type == FrameType::kClosed ? ClosedBit(peer) : AbortedBit(peer), std::memory_order_seq_cst);
  }
  Wake();
  return frame.type == FrameType::kCredit;
}

bool TcpChannel::HandleMessage(const Frame& frame) {
  if (frame.count != arrived_) return Malformed("a message out of order: " + Numbers(arrived_, frame.count));
  if (arrived_ - Told() >= num_slots()) {
    return Malformed("message " + std::to_string(arrived_) + ", for which no slot was free");
  }
  if (frame.message.payload_bytes > slot_bytes()) {
    return Malformed(TooLarge(frame.message.payload_bytes, slot_bytes()));
  }
  SlotHeader* const slot = Slot(arrived_);
  slot->message = frame.message;
  payload_ = reinterpret_cast<char*>(slot + 1);
  payload_left_ = frame.message.payload_bytes;
  if (payload_left_ == 0) Arrived();
  return true;
}

// The writer may not be told of more than it has sent, nor less than before; the reader has to have got all of it.
bool TcpChannel::HandleCount(const Frame& frame) {
  if (role() == Role::kReader) {
    if (frame.count == arrived_) return true;
    return Malformed("its last word is of another number of messages than came: " + Numbers(arrived_, frame.count));
  }
  const std::uint64_t known = credit_.load(std::memory_order_relaxed), sent = Told();
  if (frame.count < known || frame.count > sent) {
    return Malformed("it gave back another number of messages than can be: expected " + std::to_string(known) + " to " +
                     std::to_string(sent) + ", got " + std::to_string(frame.count));
  }
  credit_.store(frame.count, std::memory_order_seq_cst);
  return true;
}

std::uint64_t TcpChannel::Told() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return told_;
}

void TcpChannel::Arrived() {
  Slot(arrived_)->published.store(arrived_ + 1, std::memory_order_seq_cst);
  ++arrived_;
  Wake();
}

// A process that ends without a last word was killed. If it was sending that found out, only that knows why.
bool TcpChannel::Ended(int error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error == 0) error = send_error_;
  }
  const bool died = error == 0 || error == ECONNRESET || error == EPIPE;
  Lose(died ? kPeerDied : LostBy(error));
  return false;
}

bool TcpChannel::Malformed(const std::string& why) {
  Lose("it does not keep to the protocol: " + why);
  const std::lock_guard<std::mutex> lock(mutex_);
  Frame last;
  last.type = FrameType::kAborted;
  last.count = finished_;
  if (Unsent() == 0) send(socket_.get(), &last, sizeof(last), MSG_DONTWAIT | MSG_NOSIGNAL);
  return false;
}

bool TcpChannel::LinkLives() {
  const auto now = Clock::now();
  if (now - looked_ < kLook) return true;
  looked_ = now;
  if (Answers(socket_.get())) return true;
  Lose(LostBy(ETIMEDOUT));
  return false;
}

void TcpChannel::Lose(const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  loss_ = why;
}

std::string TcpChannel::PeerLoss() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return loss_;
}

bool TcpChannel::Ready() {
  if (role() == Role::kWriter) return next() < credit_.load(std::memory_order_seq_cst) + num_slots();
  return Slot(next())->published.load(std::memory_order_seq_cst) == next() + 1;
}

Status TcpChannel::Advance(const Message&) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (StoppedHere()) return {};
  ++finished_;
  Push();
  return {};
}

void TcpChannel::BeginDoze() {
  wakeups_seen_ = sleep_.wakeups.load(std::memory_order_seq_cst);
  sleep_.waiting.store(1, std::memory_order_seq_cst);
}

void TcpChannel::EndDoze() { sleep_.waiting.store(0, std::memory_order_relaxed); }

void TcpChannel::Doze(Nanoseconds, Nanoseconds left) {
  FutexWait(sleep_.wakeups, wakeups_seen_, std::min(kSlice, left));
}

void TcpChannel::Wake() {
  if (sleep_.waiting.load(std::memory_order_seq_cst) == 0) return;
  sleep_.wakeups.fetch_add(1, std::memory_order_seq_cst);
  FutexWake(sleep_.wakeups);
}

void TcpChannel::Abort() { Stop(AbortedBit(role())); }

void TcpChannel::Close() {
  if (getpid() != owner_) return;
  Stop(ClosedBit(role()));
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, stopped_at_ + kLinger, [this] { return delivered_ || !running_; });
}

// A forked child has no pump, and its exit must not end the channel of its parent.
void TcpChannel::Stop(std::uint32_t reason) {
  if (getpid() != owner_) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!StoppedHere()) stopped_at_ = Clock::now();
    stop_.fetch_or(reason, std::memory_order_seq_cst);
    Push();
  }
  Kick();
  Wake();
}

bool TcpChannel::StoppedHere() const {
  return (stop_.load(std::memory_order_seq_cst) & (AbortedBit(role()) | ClosedBit(role()))) != 0;
}

std::string TcpChannel::PeerLabel() const {
  const std::uint32_t pid = peer_pid();
  return PeerName(options_.peer, pid, pid == 0 ? "" : peer_host_);
}

}  // namespace lamina
