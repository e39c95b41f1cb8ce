// What a GPU end of a channel on one host keeps in memory. The ring itself is that of message.h.
#pragma once

#include <cstdint>

#include "call.h"
#include "message.h"

namespace lamina::cuda {

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

using Call = CallOf<End>;

static_assert(sizeof(Call) <= 4096, "kernel parameters have room for 4096 bytes");
static_assert(sizeof(End) == 2 * kLine);

}  // namespace lamina::cuda
