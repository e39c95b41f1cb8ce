// What the end of a `gda` channel keeps in memory.
//
//   Region         memory registered with the NIC, one at each end, as in region.h
//   End            device memory; the host writes it once, then kernels advance it, so that a CUDA graph replays them
//
// A message is two RDMA WRITEs on one reliable connection: all of the slot but its first 8 bytes, then these, the
// sequence number. The NIC performs them in that order; within one WRITE no order is relied on.
#pragma once

#include <cstdint>

#include "call.h"
#include "gda_proxy.h"
#include "gda_queue.h"
#include "region.h"

namespace lamina::cuda::gda {

struct alignas(kLine) End {
  // Set by the host.
  std::uint64_t id;  // 0 after the end was closed: then nothing below is valid
  char* region;
  std::uint64_t nic_region;   // address by which the NIC knows `region`; that of a dmabuf starts at 0
  std::uint64_t peer_region;  // address by which the peer's NIC knows its region
  std::uint64_t slot_bytes;
  std::uint64_t timeout_ns;
  const std::uint64_t* stop;  // pinned host memory: the host of this side stops the end
  FailureRecord* record;
  std::uint32_t lkey;
  std::uint32_t peer_rkey;
  std::uint32_t num_slots;
  Role role;
  SendQueue queue;
  ProxyQueue proxy;
  std::uint32_t use_proxy;  // 0: `queue`, else `proxy`; the other one is not valid

  // Advanced by kernels.
  alignas(kLine) std::uint64_t next;  // number of the message that comes next
  std::uint32_t next_slot;            // next % num_slots, as a division of 64 bits is slow on a GPU
  std::uint64_t credited;             // reader: messages given back so far
  std::uint32_t arrived;              // blocks of the running kernel that are done
  std::uint32_t failed;               // 1 from the first failure on
};

using Call = CallOf<End>;

static_assert(sizeof(Call) <= 4096, "kernel parameters have room for 4096 bytes");

}  // namespace lamina::cuda::gda
