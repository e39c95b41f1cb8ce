// What a GPU end of a channel keeps in memory, and what one call brings along. The ring itself is that of message.h.
//
//   End            device memory; the host writes it once, then kernels advance it, so that a CUDA graph can replay them
//   FailureRecord  pinned host memory; the first operation that fails writes it, the host reads it
//   Call           parameters of a kernel, the same at every replay: all that differs is in the End and the stamp
#pragma once

#include <cstdint>

#include "message.h"

namespace lamina::cuda {

inline constexpr int kMaxTensors = 32;
inline constexpr int kMaxBatches = 32;

// Why an operation of a GPU end failed. kNone must be 0.
enum class Reason : std::uint32_t {
  kNone = 0,
  kTimeout,
  kPeerDied,
  kPeerAborted,
  kPeerClosed,
  kAborted,   // by this side
  kClosed,    // by this side
  kSequence,  // the slot holds a message with another number
  kMessage,   // the slot holds another message
  kTooLarge,
  kNoChannel,  // the stamp names a batch that the program has no channel for
  kEarlier,    // an operation before this one has failed and is on record
};

// `got` is the message in the slot (kMessage) and its batch the number of channels (kNoChannel).
struct alignas(kLine) FailureRecord {
  Message expected;
  Message got;
  std::uint64_t expected_sequence;  // numbers of messages (kSequence)
  std::uint64_t got_sequence;
  std::uint32_t reason;  // a Reason; stored last
};

struct alignas(kLine) End {
  // Set by the host. 0 after the end was closed: then nothing below is valid.
  std::uint64_t id;
  RingHeader* ring;  // mapped host memory; of its words the GPU only loads `stop` and `read_seq` and stores `read_seq`
  char* slots;       // mapped host memory, or memory of a GPU
  FailureRecord* record;
  std::uint64_t slot_bytes;
  std::uint64_t timeout_ns;
  std::uint32_t num_slots;
  Role role;

  // Advanced by kernels.
  alignas(kLine) std::uint64_t next;  // sequence of the message that comes next
  std::uint64_t read_seen;            // the writer's copy of read_seq, so as not to look at it for every message
  std::uint32_t arrived;              // blocks of the running kernel that are done
  std::uint32_t failed;               // 1 from the first failure on
  std::uint32_t slot;                 // next % num_slots, which is a slow thing to compute on a GPU
};

struct Tensor {
  char* data;  // device memory; may be null if it has no bytes
  std::uint64_t bytes;
};

struct Call {
  const std::int32_t* stamp;  // device memory: step, layer, batch
  std::int32_t* stamp_out;
  std::uint64_t payload_bytes;
  std::uint64_t layout;
  std::int32_t tag;
  std::uint32_t num_tensors;
  std::uint32_t num_ends;
  End* ends[kMaxBatches];  // by batch
  std::uint64_t ids[kMaxBatches];
  Tensor tensors[kMaxTensors];
};

static_assert(sizeof(Call) <= 4096, "kernel parameters have room for 4096 bytes");
static_assert(sizeof(End) == 2 * kLine);

}  // namespace lamina::cuda
