// What both families of GPU ends share: what one call brings along, and what a failure leaves behind. An `End` is that
// of layout.h or of gda_layout.h.
//
//   End            device memory; the host writes it once, then kernels advance it, so that a CUDA graph can replay them
//   FailureRecord  pinned host memory; the first operation that fails writes it, the host reads it
//   CallOf<End>    parameters of a kernel, the same at every replay: all that differs is in the End and the stamp
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
  kQueue,      // the NIC's send queue broke: `queue_error` says how
  kEarlier,    // an operation before this one has failed and is on record
};

// `got` is the message in the slot (kMessage) and its batch the number of channels (kNoChannel).
struct alignas(kLine) FailureRecord {
  Message expected;
  Message got;
  std::uint64_t expected_sequence;  // numbers of messages (kSequence)
  std::uint64_t got_sequence;
  std::uint32_t queue_error;  // as gda::QueueState::error (kQueue)
  std::uint32_t reason;       // a Reason; stored last
};

struct Tensor {
  char* data;  // device memory; may be null if it has no bytes
  std::uint64_t bytes;
};

template <typename End>
struct CallOf {
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

}  // namespace lamina::cuda
