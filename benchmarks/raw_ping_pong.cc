// The floor for channel_latency.py: two processes pass messages through two rings laid out as in message.h and do
// nothing but copy the payload in, publish, poll and copy it out. No waiting flag, no sleeping, no checks.
//
// usage: raw_ping_pong PAYLOAD_BYTES NUM_SLOTS ROUNDS CORE CORE      prints nanoseconds per round trip
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "message.h"

namespace {

using lamina::RingHeader;
using lamina::SlotHeader;

// Aligned like the buffers of XLA.
struct Payload {
  explicit Payload(std::uint64_t bytes)
      : size(bytes), data(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096))) {
    std::memset(data, 1, size);
  }
  std::uint64_t size;
  char* data;
};

struct Ring {
  RingHeader* header;
  char* slots;
  std::uint64_t num_slots;
  std::uint64_t slot_bytes;

  SlotHeader* Slot(std::uint64_t sequence) const {
    return reinterpret_cast<SlotHeader*>(slots + sequence % num_slots * lamina::SlotStride(slot_bytes));
  }
};

Ring MakeRing(std::uint64_t num_slots, std::uint64_t slot_bytes) {
  void* memory = mmap(nullptr, lamina::RingBytes(num_slots, slot_bytes), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  auto* header = new (memory) RingHeader{};
  return {header, static_cast<char*>(memory) + sizeof(RingHeader), num_slots, slot_bytes};
}

// Polls; gives the core away only when that has taken so long that the other process cannot be running.
template <typename Ready>
void Await(const Ready& ready) {
  for (int i = 0; !ready(); ++i) {
    __builtin_ia32_pause();
    if (i > 1000) sched_yield();
  }
}

void Send(const Ring& ring, std::uint64_t sequence, const Payload& payload) {
  Await([&] { return sequence - ring.header->read_seq.load(std::memory_order_acquire) < ring.num_slots; });
  SlotHeader* slot = ring.Slot(sequence);
  std::memcpy(slot + 1, payload.data, payload.size);
  slot->published.store(sequence + 1, std::memory_order_release);
}

void Recv(const Ring& ring, std::uint64_t sequence, Payload& payload) {
  const SlotHeader* slot = ring.Slot(sequence);
  Await([&] { return slot->published.load(std::memory_order_acquire) == sequence + 1; });
  std::memcpy(payload.data, slot + 1, payload.size);
  ring.header->read_seq.store(sequence + 1, std::memory_order_release);
}

void PinTo(const char* core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(std::atoi(core), &cores);
  if (sched_setaffinity(0, sizeof(cores), &cores) != 0) std::abort();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::uint64_t bytes = std::strtoull(argv[1], nullptr, 10);
  const std::uint64_t num_slots = std::strtoull(argv[2], nullptr, 10);
  const std::uint64_t rounds = std::strtoull(argv[3], nullptr, 10);
  const Ring there = MakeRing(num_slots, lamina::AlignToLine(bytes));
  const Ring back = MakeRing(num_slots, lamina::AlignToLine(bytes));
  Payload payload(bytes);
  const std::uint64_t warm_up = rounds / 10 + 10;

  const pid_t child = fork();
  PinTo(argv[child == 0 ? 5 : 4]);
  if (child == 0) {
    for (std::uint64_t i = 0; i < warm_up + rounds; ++i) {
      Recv(there, i, payload);
      Send(back, i, payload);
    }
    _exit(0);
  }
  auto start = std::chrono::steady_clock::now();
  for (std::uint64_t i = 0; i < warm_up + rounds; ++i) {
    if (i == warm_up) start = std::chrono::steady_clock::now();
    Send(there, i, payload);
    Recv(back, i, payload);
  }
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  waitpid(child, nullptr, 0);
  std::printf("%.1f\n", spent.count() / static_cast<double>(rounds));
}
