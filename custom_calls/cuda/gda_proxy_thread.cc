#include "gda_proxy_thread.h"

namespace lamina::cuda::gda {
namespace {

// How long the NIC may leave the send queue full. It ends on its own terms well before: by a completion or an error.
constexpr std::uint64_t kPostNs = 60'000'000'000;
constexpr std::uint32_t kIdlePolls = 64;

}  // namespace

ProxyThread::ProxyThread(ProxyQueue proxy, SendQueue queue)
    : proxy_(proxy), queue_(queue), thread_([this] { Run(); }) {}

ProxyThread::~ProxyThread() {
  stop_.store(true, std::memory_order_release);
  thread_.join();
}

bool ProxyThread::Settle(std::uint64_t deadline_ns) {
  const std::uint32_t mine = asked_.fetch_add(1, std::memory_order_acq_rel) + 1;
  while (settled_.load(std::memory_order_acquire) < mine) {
    if (NowNs() > deadline_ns) return false;
    std::this_thread::yield();
  }
  return true;
}

// What was asked for before the destructor is still posted.
void ProxyThread::Run() {
  while (true) {
    const bool stopping = stop_.load(std::memory_order_acquire);
    const std::uint32_t asked = asked_.load(std::memory_order_acquire);
    bool idle = true;
    for (std::uint32_t poll = 0; poll < kIdlePolls; ++poll) {
      while (TakeOne()) idle = false;
    }
    // Device code waits for answers, not for completions, so an error shows only if somebody looks.
    while (PollCompletion(queue_)) {
    }
    ReportCompleted();
    if (const std::uint32_t error = ErrorOf(queue_); error != kOk) Report(error);
    const bool done = LoadAcquireSystem(&queue_.state->completed) == LoadRelaxedSystem(&queue_.state->reserved);
    if (idle && (done || ErrorOf(queue_) != kOk)) settled_.store(asked, std::memory_order_release);
    if (stopping && idle) return;
    if (idle) std::this_thread::yield();
  }
}

bool ProxyThread::TakeOne() {
  const ProxyEntry& entry = EntryAt(proxy_, taken_);
  if (LoadAcquireSystem(&entry.sequence) != taken_ + 1) return false;
  writes_.push_back(entry.write);
  const bool last = entry.last != 0;
  StoreReleaseSystem(&proxy_.words->taken, ++taken_);
  if (last) PostTaken();
  return true;
}

void ProxyThread::PostTaken() {
  const std::uint32_t error =
      Post(queue_, writes_.data(), static_cast<std::uint32_t>(writes_.size()), NowNs() + kPostNs);
  writes_.clear();
  if (error != kOk) Report(error);
}

void ProxyThread::Report(std::uint32_t error) {
  if (LoadRelaxedSystem(&proxy_.words->error) == kOk) StoreReleaseSystem(&proxy_.words->error, error);
}

// Nobody else posts to the queue, so a request's number is also that of its WQE.
void ProxyThread::ReportCompleted() {
  const std::uint64_t completed = LoadRelaxedSystem(&queue_.state->completed);
  if (LoadRelaxedSystem(&proxy_.words->completed) == completed) return;
  StoreReleaseSystem(&proxy_.words->completed, completed);
}

}  // namespace lamina::cuda::gda
