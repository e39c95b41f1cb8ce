// How device code gets WRITEs posted where the GPU cannot reach the NIC's doorbell: it leaves them in a queue in pinned
// memory, and a thread of the host posts them with the very code of gda_queue.h.
#pragma once

#include <cstdint>

#include "gda_queue.h"
#include "mlx5_layout.h"
#include "ptx.h"

namespace lamina::cuda::gda {

struct alignas(64) ProxyEntry {
  std::uint64_t sequence;  // n + 1 once request n is complete
  std::uint64_t last;      // 1 in the last request of one Post: to be posted together with those before it
  Write write;
};
static_assert(sizeof(ProxyEntry) == 64);

// Pinned host memory, zero at first.
struct ProxyWords {
  alignas(64) std::uint64_t taken;  // requests that the host has read; only the host stores
  alignas(64) std::uint32_t error;  // as QueueState::error; only the host stores
  alignas(64) std::uint64_t completed;  // requests that the NIC is done with; only the host stores
};

struct ProxyQueue {
  ProxyEntry* entries;      // pinned host memory, 2^log_num_entries
  ProxyWords* words;
  std::uint64_t* reserved;  // device memory: requests handed out
  std::uint32_t log_num_entries;
};

LAMINA_DEVICE ProxyEntry& EntryAt(const ProxyQueue& proxy, std::uint64_t index) {
  return proxy.entries[index & ((std::uint64_t{1} << proxy.log_num_entries) - 1)];
}

// As Post, as requests from `first` on, which were handed out already.
LAMINA_DEVICE std::uint32_t PostAt(const ProxyQueue& proxy, std::uint64_t first, const Write* writes,
                                   std::uint32_t count, std::uint64_t deadline_ns) {
  const std::uint64_t room = std::uint64_t{1} << proxy.log_num_entries;
  while (first + count - LoadAcquireSystem(&proxy.words->taken) > room) {
    if (const std::uint32_t error = LoadAcquireSystem(&proxy.words->error); error != kOk) return error;
    if (NowNs() > deadline_ns) return kStuck;
    Nanosleep(kNapNs);
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    ProxyEntry& entry = EntryAt(proxy, first + i);
    entry.write = writes[i];
    entry.last = i + 1 == count;
    FenceSystem();
    StoreReleaseSystem(&entry.sequence, first + i + 1);
  }
  return kOk;
}

// As the Post of a SendQueue. It returns before the NIC was told.
LAMINA_DEVICE std::uint32_t Post(const ProxyQueue& proxy, const Write* writes, std::uint32_t count,
                                 std::uint64_t deadline_ns) {
  if (const std::uint32_t error = LoadAcquireSystem(&proxy.words->error); error != kOk) return error;
  return PostAt(proxy, AtomicAddDevice(proxy.reserved, std::uint64_t{count}), writes, count, deadline_ns);
}

// As the PostIfIdle of a SendQueue.
LAMINA_DEVICE void PostIfIdle(const ProxyQueue& proxy, const Write& write, std::uint64_t deadline_ns) {
  const std::uint64_t completed = LoadAcquireSystem(&proxy.words->completed);
  if (AtomicCasDevice(proxy.reserved, completed, completed + 1) != completed) return;
  PostAt(proxy, completed, &write, 1, deadline_ns);
}

}  // namespace lamina::cuda::gda
