#include "channel_end.h"

#include <sched.h>

#include <algorithm>
#include <utility>

namespace lamina {
namespace {

// How long a spin keeps its core to itself.
constexpr std::chrono::microseconds kPolite{4};
// What an end with a remote peer still polls when waits are long.
constexpr double kShortSpinUs = 20;

void CpuRelax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Nanoseconds Seconds(double seconds) {
  return std::chrono::duration_cast<Nanoseconds>(std::chrono::duration<double>(seconds));
}

}  // namespace

ChannelEnd::ChannelEnd(EndOptions options, char* slots, std::uint32_t num_slots, std::uint64_t slot_bytes)
    : options_(std::move(options)), slots_(slots), num_slots_(num_slots), slot_bytes_(slot_bytes) {}

Status ChannelEnd::Reserve(const Message& message, char** payload) {
  if (Status status = Begin(message); !status.ok()) return status;
  if (message.payload_bytes > slot_bytes_) {
    return Fail(message, Code::kFailedPrecondition, TooLarge(message.payload_bytes, slot_bytes_));
  }
  if (Status status = AwaitReady(message); !status.ok()) return status;
  SlotHeader* const slot = Slot(next_);
  slot->message = message;
  *payload = reinterpret_cast<char*>(slot + 1);
  return {};
}

Status ChannelEnd::Publish() { return End(); }

Status ChannelEnd::Peek(const Message& expected, const char** payload) {
  if (Status status = Begin(expected); !status.ok()) return status;
  if (Status status = AwaitReady(expected); !status.ok()) return status;
  const SlotHeader* const slot = Slot(next_);
  const std::uint64_t published = slot->published.load(std::memory_order_relaxed);
  const std::string difference =
      published == next_ + 1 ? Difference(expected, slot->message) : Mismatch("sequence", next_, published - 1);
  if (!difference.empty()) return Fail(expected, Code::kFailedPrecondition, difference);
  *payload = reinterpret_cast<const char*>(slot + 1);
  return {};
}

Status ChannelEnd::Release() { return End(); }

Status ChannelEnd::Begin(const Message& message) {
  if (busy_.exchange(true, std::memory_order_acquire)) {
    return Fail(message, Code::kFailedPrecondition, "another program is using this end of the channel");
  }
  if (failed_.load(std::memory_order_acquire)) return FailedEarlier();
  current_ = message;
  return CheckStop(message);
}

Status ChannelEnd::End() {
  Status status = Advance(current_);
  ++next_;
  busy_.store(false, std::memory_order_release);
  return status;
}

Status ChannelEnd::AwaitReady(const Message& message) {
  if (Ready()) return {};
  const auto start = Clock::now();
  if (SpinUntilReady(start)) {
    waited_long_ = false;
    return {};
  }
  Status status = SleepUntilReady(message, start);
  waited_long_ = Clock::now() - start > Seconds(options_.spin_us * 1e-6);
  return status;
}

// Polls flat out for a moment, in case the peer runs on another core; then lets others run between looks, in case it
// waits for this one. The clock costs more than a look: ask it rarely. A remote peer waits for no core of this host, and
// a look at a NIC's queue takes as long as a pause, so there it looks longer between yields and does not pause.
bool ChannelEnd::SpinUntilReady(Clock::time_point start) {
  const bool little = options_.remote && waited_long_;
  const auto end = start + Seconds((little ? std::min(kShortSpinUs, options_.spin_us) : options_.spin_us) * 1e-6);
  const int looks = options_.remote ? 256 : 32;
  for (auto now = start; now < end; now = Clock::now()) {
    if (now - start > kPolite) sched_yield();
    for (int i = 0; i < looks; ++i) {
      if (Ready()) return true;
      if (!options_.remote) CpuRelax();
    }
  }
  return false;
}

Status ChannelEnd::SleepUntilReady(const Message& message, Clock::time_point start) {
  const auto deadline = start + Seconds(options_.timeout_s);
  while (true) {
    BeginDoze();
    if (Ready()) break;
    if (Status status = CheckStop(message); !status.ok()) return status;
    // Look once more after the peer was found lost: its last message may have come in between.
    if (const std::string loss = PeerLoss(); !loss.empty()) {
      if (Ready()) break;
      return Fail(message, Code::kUnavailable, loss);
    }
    const auto now = Clock::now();
    const auto left = deadline - now;
    if (left <= left.zero()) {
      return Fail(message, Code::kDeadlineExceeded, TimeoutReason(options_.role, options_.timeout_s) + kPeerLives);
    }
    Doze(now - start, left);
  }
  EndDoze();
  return {};
}

Status ChannelEnd::CheckStop(const Message& message) {
  const std::uint32_t bits = stop();
  if (bits == 0) return {};
  const Role mine = options_.role, peer = PeerRole();
  if (bits & ClosedBit(mine)) return Fail(message, Code::kAborted, kSelfClosed);
  if (bits & AbortedBit(mine)) return Fail(message, Code::kAborted, kSelfAborted);
  if (bits & AbortedBit(peer)) return Fail(message, Code::kAborted, kPeerAborted);
  if (!(bits & ClosedBit(peer)) || (mine == Role::kReader && Ready())) return {};
  return Fail(message, Code::kUnavailable, kPeerClosed);
}

Status ChannelEnd::Fail(const Message& message, Code code, const std::string& why) {
  std::string text = FailureText(options_.role, message, PeerLabel(), why);
  {
    const std::lock_guard<std::mutex> lock(failure_mutex_);
    if (failure_.ok()) failure_ = Status{code, std::move(text)};
  }
  failed_.store(true, std::memory_order_release);
  Abort();
  return FailedEarlier();
}

Status ChannelEnd::FailedEarlier() const {
  const std::lock_guard<std::mutex> lock(failure_mutex_);
  return failure_;
}

std::optional<std::string> ChannelEnd::failure() const {
  const Status status = FailedEarlier();
  return status.ok() ? std::nullopt : std::make_optional(status.text);
}

}  // namespace lamina
