// Posting RDMA WRITEs to an mlx5 send queue from device code, and learning of their completion.
//
// Any number of threads may post to one queue. Each takes positions with an atomic addition, writes its WQEs there, and
// waits for its turn to call them ready, so that WQEs become ready in order. Whoever gets the lock then shows the NIC
// all that is ready: first the doorbell record, then, behind a fence, the doorbell. A position is used again only when
// the completion queue says that the NIC is done with it; whoever needs one reads that queue, under a lock of its own.
//
// Every wait ends at a deadline. A wait that does not succeed leaves a hole in the queue, so it breaks the queue for
// good, as an error completion does.
#pragma once

#include <cstdint>

#include "mlx5_layout.h"
#include "ptx.h"

namespace lamina::cuda::gda {

inline constexpr std::uint32_t kPollsPerLook = 32;  // polls between looks at the clock
inline constexpr std::uint32_t kNapNs = 40;
inline constexpr std::uint64_t kDrainNs = 1'000'000'000;  // how long what was sent may take to arrive after a close
inline constexpr std::uint32_t kMaxLogWqes = 15;  // 2^15: WQE counters of 16 bits must tell half of them apart

// QueueState::error: kOk, kStuck, or kNicError | vendor syndrome << 8 | syndrome.
inline constexpr std::uint32_t kOk = 0;
inline constexpr std::uint32_t kStuck = 1u << 16;     // a position or a lock could not be had in time
inline constexpr std::uint32_t kNicError = 1u << 17;  // a completion with an error

// Zero at first. Only the threads that post touch it: device memory, or memory of the host under the CPU proxy.
struct QueueState {
  alignas(64) std::uint64_t reserved;  // positions handed out
  std::uint64_t ready;                 // WQEs written, without holes
  std::uint64_t posted;                // WQEs that the NIC was told of
  std::uint32_t post_lock;
  alignas(64) std::uint64_t completed;  // WQEs that the NIC is done with
  std::uint64_t cq_consumer;            // CQEs read
  std::uint32_t poll_lock;
  std::uint32_t error;  // the first one stays
};

// What the host sets up and nobody changes.
struct SendQueue {
  char* wqes;               // 2^log_num_wqes of kWqeBytes
  char* cqes;               // 2^log_num_cqes of kCqeBytes, at least as many as there are WQEs
  std::uint32_t* record;    // the queue pair's doorbell record; its word kSendRecord is ours
  std::uint32_t* cq_record;
  std::uint64_t* doorbell;  // a register of the NIC (UAR)
  QueueState* state;
  std::uint32_t log_num_wqes;
  std::uint32_t log_num_cqes;
  std::uint32_t qpn;
};

LAMINA_DEVICE std::uint32_t ErrorOf(const SendQueue& queue) { return LoadAcquireSystem(&queue.state->error); }

LAMINA_DEVICE std::uint32_t Break(const SendQueue& queue, std::uint32_t error) {
  const std::uint32_t before = AtomicCasSystem(&queue.state->error, kOk, error);
  return before == kOk ? error : before;
}

// One reader at a time. Returns whether there was a completion to read.
LAMINA_DEVICE bool PollCompletion(const SendQueue& queue) {
  QueueState& state = *queue.state;
  if (AtomicExchangeDevice(&state.poll_lock, 1u) != 0) return false;
  const std::uint64_t consumer = LoadRelaxedSystem(&state.cq_consumer);
  const char* const cqe = queue.cqes + (consumer & ((std::uint64_t{1} << queue.log_num_cqes) - 1)) * kCqeBytes;
  const CqeTail tail{LoadAcquireSystem(reinterpret_cast<const std::uint64_t*>(cqe + kCqeTailOffset))};
  // Which round over the ring the NIC was on when it wrote this CQE.
  const auto round = static_cast<std::uint32_t>(consumer >> queue.log_num_cqes) & kCqeOwnerMask;
  const bool found = tail.opcode() != kCqeInvalid && tail.owner() == round;
  if (found) {
    if (tail.opcode() == kCqeOk) {
      const std::uint64_t completed = LoadRelaxedSystem(&state.completed);
      const auto more = static_cast<std::uint16_t>(tail.wqe_counter() + 1u - static_cast<std::uint16_t>(completed));
      StoreReleaseSystem(&state.completed, completed + more);
    } else {
      const auto syndrome = static_cast<std::uint8_t>(cqe[kCqeSyndromeOffset]);
      const auto vendor = static_cast<std::uint8_t>(cqe[kCqeVendorSyndromeOffset]);
      Break(queue, kNicError | static_cast<std::uint32_t>(vendor) << 8 | syndrome);
    }
    StoreRelaxedSystem(&state.cq_consumer, consumer + 1);
    StoreReleaseSystem(&queue.cq_record[kCqConsumerRecord], CqConsumerValue(consumer + 1));
  }
  StoreReleaseSystem(&state.poll_lock, 0u);
  return found;
}

// Reads completions until ready() or the deadline. kOk, or what broke the queue.
template <typename Ready>
LAMINA_DEVICE std::uint32_t AwaitQueue(const SendQueue& queue, std::uint64_t deadline_ns, Ready ready) {
  while (true) {
    for (std::uint32_t poll = 0; poll < kPollsPerLook; ++poll) {
      if (ready()) return kOk;
      if (!PollCompletion(queue)) Nanosleep(kNapNs);
    }
    if (const std::uint32_t error = ErrorOf(queue); error != kOk) return error;
    if (NowNs() > deadline_ns) return Break(queue, kStuck);
  }
}

// Are the positions before `end` within one round of what has completed?
struct HasPositions {
  const SendQueue& queue;
  std::uint64_t end;
  LAMINA_DEVICE bool operator()() const {
    return end - LoadAcquireSystem(&queue.state->completed) <= std::uint64_t{1} << queue.log_num_wqes;
  }
};

struct IsTurn {
  const SendQueue& queue;
  std::uint64_t position;
  LAMINA_DEVICE bool operator()() const { return LoadAcquireSystem(&queue.state->ready) == position; }
};

// Takes the lock, unless another thread has told the NIC of everything before `end` in the meantime.
struct HasLockOrIsPosted {
  const SendQueue& queue;
  std::uint64_t end;
  bool* locked;
  LAMINA_DEVICE bool operator()() const {
    if (LoadAcquireSystem(&queue.state->posted) >= end) return true;
    *locked = AtomicExchangeDevice(&queue.state->post_lock, 1u) == 0;
    return *locked;
  }
};

LAMINA_DEVICE char* WqeAt(const SendQueue& queue, std::uint64_t index) {
  return queue.wqes + (index & ((std::uint64_t{1} << queue.log_num_wqes) - 1)) * kWqeBytes;
}

LAMINA_DEVICE void StoreWqe(const SendQueue& queue, std::uint64_t index, const Wqe& wqe) {
  char* const to = WqeAt(queue, index);
  for (std::uint32_t i = 0; i < kSegments; ++i) Store16(to + i * sizeof(Vec16), wqe.segment[i]);
}

// The NIC may fetch WQEs as soon as the record covers them; the doorbell only tells it to look. So the record must
// never be behind the doorbell, nor ahead of the WQEs. (rdma-core keeps the same order in post_send_db.)
LAMINA_DEVICE void RingDoorbell(const SendQueue& queue, std::uint64_t producer) {
  FenceSystem();
  StoreReleaseSystem(&queue.record[kSendRecord], SendRecordValue(producer));
  FenceSystem();
  StoreMmio64(queue.doorbell, DoorbellValue(WqeAt(queue, producer - 1)));
}

// Under the lock.
LAMINA_DEVICE void PostReady(const SendQueue& queue) {
  const std::uint64_t ready = LoadAcquireSystem(&queue.state->ready);
  if (ready == LoadRelaxedSystem(&queue.state->posted)) return;
  RingDoorbell(queue, ready);
  StoreReleaseSystem(&queue.state->posted, ready);
}

// As Post, at positions that were handed out already.
LAMINA_DEVICE std::uint32_t PostAt(const SendQueue& queue, std::uint64_t first, const Write* writes,
                                   std::uint32_t count, std::uint64_t deadline_ns) {
  QueueState& state = *queue.state;
  const std::uint64_t end = first + count;
  if (const std::uint32_t error = AwaitQueue(queue, deadline_ns, HasPositions{queue, end}); error != kOk) return error;
  for (std::uint32_t i = 0; i < count; ++i) {
    StoreWqe(queue, first + i, BuildWqe(writes[i], first + i, queue.qpn, i + 1 == count));
  }
  if (const std::uint32_t error = AwaitQueue(queue, deadline_ns, IsTurn{queue, first}); error != kOk) return error;
  FenceSystem();
  StoreReleaseSystem(&state.ready, end);
  bool locked = false;
  const HasLockOrIsPosted posted{queue, end, &locked};
  if (const std::uint32_t error = AwaitQueue(queue, deadline_ns, posted); error != kOk) return error;
  if (!locked) return kOk;
  PostReady(queue);
  StoreReleaseSystem(&state.post_lock, 0u);
  return kOk;
}

// Posts `count` WRITEs, which the NIC performs in order and completes with one CQE. Returns when the NIC was told, not
// when it is done. `count` is at most the number of WQEs of the queue. kOk, or what broke the queue.
LAMINA_DEVICE std::uint32_t Post(const SendQueue& queue, const Write* writes, std::uint32_t count,
                                 std::uint64_t deadline_ns) {
  if (const std::uint32_t error = ErrorOf(queue); error != kOk) return error;
  const std::uint64_t first = AtomicAddDevice(&queue.state->reserved, std::uint64_t{count});
  return PostAt(queue, first, writes, count, deadline_ns);
}

// Posts a WRITE if all that was posted before is complete, else nothing: what is under way says as much about the
// connection as one more would. So however many threads call this, one such WRITE at most is under way.
LAMINA_DEVICE void PostIfIdle(const SendQueue& queue, const Write& write, std::uint64_t deadline_ns) {
  const std::uint64_t completed = LoadAcquireSystem(&queue.state->completed);
  if (AtomicCasDevice(&queue.state->reserved, completed, completed + 1) != completed) return;
  PostAt(queue, completed, &write, 1, deadline_ns);
}

// Waits until the NIC is done with all that was posted before. False if the queue is broken or the deadline comes first.
LAMINA_DEVICE bool Drain(const SendQueue& queue, std::uint64_t deadline_ns) {
  const std::uint64_t end = LoadRelaxedSystem(&queue.state->reserved);
  while (LoadAcquireSystem(&queue.state->completed) < end) {
    if (ErrorOf(queue) != kOk || NowNs() > deadline_ns) return false;
    if (!PollCompletion(queue)) Nanosleep(kNapNs);
  }
  return true;
}

}  // namespace lamina::cuda::gda
