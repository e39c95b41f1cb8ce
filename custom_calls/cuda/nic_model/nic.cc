#include "nic.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace lamina::nic_model {
namespace {

// Layouts and values of the mlx5 documentation (rdma-core's mlx5dv.h and qp.c), as the NIC sees them: byte by byte.
constexpr std::size_t kWqeBytes = 64, kCqeBytes = 64;
constexpr std::uint8_t kRdmaWrite = 0x08;
constexpr std::uint8_t kCqUpdate = 0x08;
constexpr std::uint32_t kInline = 0x80000000u;
constexpr std::uint8_t kSyndromeQpOperation = 0x02, kSyndromeLocalProtection = 0x04, kSyndromeFlushed = 0x05,
                       kSyndromeRemoteAccess = 0x13, kSyndromeRetries = 0x15;
constexpr std::uint8_t kCqeRequester = 0, kCqeRequesterError = 13;
constexpr std::size_t kMaxViolations = 100;
constexpr std::size_t kMaxDue = 48;  // completions held back

std::uint32_t Be32(const unsigned char* at) {
  return std::uint32_t{at[0]} << 24 | std::uint32_t{at[1]} << 16 | std::uint32_t{at[2]} << 8 | at[3];
}

std::uint64_t Be64(const unsigned char* at) { return std::uint64_t{Be32(at)} << 32 | Be32(at + 4); }

// A word that the other side stores at once, taken apart as the bytes it has in memory.
template <typename T>
std::uint32_t LoadBe32(const T* word, std::size_t offset = 0) {
  const T value = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  unsigned char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  return Be32(bytes + offset);
}

}  // namespace

Nic::Nic(Behaviour behaviour) : behaviour_(behaviour), random_(behaviour.seed) {}

Nic::~Nic() { Stop(); }

void Nic::Stop() {
  stop_.store(true, std::memory_order_release);
  if (thread_.joinable()) thread_.join();
}

MemoryKeys Nic::Register(void* memory, std::uint64_t bytes, std::uint64_t nic_address, bool remote_write) {
  // Keys that differ between NICs, regions and directions, so that a mix-up cannot go unnoticed.
  const auto number = static_cast<std::uint32_t>(regions_.size() + 1);
  const std::uint32_t base = behaviour_.seed << 16 | number << 8;
  const MemoryKeys keys{base | 1, base | 2};
  regions_.push_back({static_cast<unsigned char*>(memory), nic_address, bytes, keys, remote_write});
  return keys;
}

void Nic::AddQueuePair(const QueuePairMemory& memory, Nic* peer) {
  auto qp = std::make_unique<QueuePair>();
  qp->memory = memory;
  qp->peer = peer;
  qp->last_doorbell = __atomic_load_n(memory.doorbell, __ATOMIC_ACQUIRE);
  queue_pairs_.push_back(std::move(qp));
}

void Nic::Start() {
  thread_ = std::thread([this] { Run(); });
}

std::vector<std::string> Nic::violations() const {
  const std::lock_guard<std::mutex> lock(violations_mutex_);
  return violations_;
}

void Nic::Violation(const QueuePair& qp, const std::string& what) {
  const std::lock_guard<std::mutex> lock(violations_mutex_);
  if (violations_.size() >= kMaxViolations) return;
  violations_.push_back("queue pair " + std::to_string(qp.memory.qpn) + ", WQE " + std::to_string(qp.consumer) + ": " +
                        what);
}

void Nic::Run() {
  while (!stop_.load(std::memory_order_acquire)) {
    bool busy = false;
    for (const auto& qp : queue_pairs_) busy |= Serve(*qp);
    if (!busy) std::this_thread::yield();
  }
}

// A WQE at a time, so that queue pairs take turns.
bool Nic::Serve(QueuePair& qp) {
  if (link_.load(std::memory_order_acquire) == Link::kStalled) return false;
  const bool rung = LookAtDoorbell(qp);
  const bool work = qp.consumer < qp.producer;
  if (work) Execute(qp);
  WriteDueCompletions(qp, !work);
  return rung || work;
}

// first 8 bytes of a WQE: opmod, index (2), opcode, qpn (3), ds
bool Nic::LookAtDoorbell(QueuePair& qp) {
  const std::uint64_t doorbell = __atomic_load_n(qp.memory.doorbell, __ATOMIC_ACQUIRE);
  if (doorbell == qp.last_doorbell) return false;
  qp.last_doorbell = doorbell;
  unsigned char bytes[8];
  std::memcpy(bytes, &doorbell, sizeof(bytes));
  const std::uint32_t qpn = Be32(bytes + 4) >> 8;
  if (qpn != qp.memory.qpn) Violation(qp, "the doorbell names queue pair " + std::to_string(qpn));
  if (bytes[0] != 0 || bytes[3] != kRdmaWrite || bytes[7] != 3) {
    Violation(qp, "the doorbell is not the start of an RDMA WRITE's control segment");
  }
  LookAtRecord(qp, static_cast<std::uint16_t>(bytes[1] << 8 | bytes[2]));
  doorbells_.fetch_add(1, std::memory_order_release);
  return true;
}

void Nic::LookAtRecord(QueuePair& qp, std::uint16_t rung) {
  const std::uint32_t record = LoadBe32(&qp.memory.record[1]);
  if (record > 0xffff) Violation(qp, "the doorbell record has reserved bits set: " + std::to_string(record));
  const auto index = static_cast<std::uint16_t>(record);
  // Distances in 16-bit arithmetic: the counters wrap.
  if (static_cast<std::int16_t>(index - static_cast<std::uint16_t>(rung + 1)) < 0) {
    Violation(qp, "the doorbell rang for WQE " + std::to_string(rung) + " before the doorbell record covered it (" +
                      std::to_string(index) + ")");
  }
  const auto fresh = static_cast<std::int16_t>(index - static_cast<std::uint16_t>(qp.producer));
  if (fresh < 0) {
    Violation(qp, "the doorbell record ran backwards to " + std::to_string(index));
    return;
  }
  qp.producer += static_cast<std::uint16_t>(fresh);
  if (qp.producer - qp.consumer > qp.memory.num_wqes) {
    Violation(qp, "the doorbell record covers " + std::to_string(qp.producer - qp.consumer) + " WQEs of a queue of " +
                      std::to_string(qp.memory.num_wqes));
    qp.producer = qp.consumer + qp.memory.num_wqes;
  }
}

void Nic::Execute(QueuePair& qp) {
  unsigned char wqe[kWqeBytes];
  std::memcpy(wqe, qp.memory.wqes + qp.consumer % qp.memory.num_wqes * kWqeBytes, kWqeBytes);
  const std::uint8_t syndrome = qp.failed ? kSyndromeFlushed : Perform(qp, wqe);
  const Completion completion{static_cast<std::uint16_t>(qp.consumer), wqe[3], syndrome};
  if (syndrome != 0) qp.failed = true;
  const bool signaled = (wqe[11] & kCqUpdate) != 0;
  ++qp.consumer;
  if (signaled || syndrome != 0) Complete(qp, completion);
}

// 0, or the syndrome of a control segment that the hardware cannot run.
std::uint8_t Nic::CheckControl(const QueuePair& qp, const unsigned char* wqe) {
  std::uint8_t syndrome = 0;
  const auto require = [&](bool holds, const std::string& what) {
    if (holds) return;
    Violation(qp, what);
    syndrome = kSyndromeQpOperation;
  };
  const auto index = static_cast<std::uint16_t>(wqe[1] << 8 | wqe[2]);
  require(wqe[0] == 0, "opmod " + std::to_string(wqe[0]) + " is not 0");
  require(index == static_cast<std::uint16_t>(qp.consumer), "its index is " + std::to_string(index));
  require(wqe[3] == kRdmaWrite, "opcode " + std::to_string(wqe[3]) + " is not RDMA WRITE");
  require(Be32(wqe + 4) >> 8 == qp.memory.qpn, "its queue pair is " + std::to_string(Be32(wqe + 4) >> 8));
  require(wqe[7] == 3, "ds " + std::to_string(wqe[7]) + " is not 3");
  require(wqe[8] == 0 && wqe[9] == 0 && wqe[10] == 0, "signature or stream is not 0");
  require((wqe[11] & ~kCqUpdate) == 0, "fm_ce_se " + std::to_string(wqe[11]) + " has other bits than CQ_UPDATE");
  require(Be32(wqe + 12) == 0, "imm is not 0 in a WRITE without immediate data");
  require(Be32(wqe + 28) == 0, "the reserved word of the remote address segment is not 0");
  return syndrome;
}

std::uint8_t Nic::Perform(QueuePair& qp, const unsigned char* wqe) {
  if (const std::uint8_t syndrome = CheckControl(qp, wqe); syndrome != 0) return syndrome;
  const std::uint64_t remote = Be64(wqe + 16);
  const std::uint32_t rkey = Be32(wqe + 24);
  const bool is_inline = (Be32(wqe + 32) & kInline) != 0;
  const std::uint32_t bytes = Be32(wqe + 32) & ~kInline;
  if (bytes == 0) {
    Violation(qp, "byte_count is 0, which the NIC takes for 2 GB");
    return kSyndromeQpOperation;
  }
  const unsigned char* from = wqe + 36;
  if (is_inline) {
    if (bytes > 12) {
      Violation(qp, std::to_string(bytes) + " bytes inline do not fit a ds of 3");
      return kSyndromeQpOperation;
    }
  } else {
    from = Find(Be32(wqe + 36), false, Be64(wqe + 40), bytes);
    if (from == nullptr) return kSyndromeLocalProtection;
  }
  if (link_.load(std::memory_order_acquire) == Link::kDown) return kSyndromeRetries;
  unsigned char* const to = qp.peer->Find(rkey, true, remote, bytes);
  if (to == nullptr) return kSyndromeRemoteAccess;
  Deliver(to, from, bytes);
  writes_.fetch_add(1, std::memory_order_release);
  return 0;
}

unsigned char* Nic::Find(std::uint32_t key, bool remote, std::uint64_t address, std::uint64_t bytes) const {
  for (const Region& region : regions_) {
    if ((remote ? region.keys.rkey : region.keys.lkey) != key) continue;
    if (remote && !region.remote_write) return nullptr;
    if (address < region.begin || bytes > region.bytes || address - region.begin > region.bytes - bytes) return nullptr;
    return region.memory + (address - region.begin);
  }
  return nullptr;
}

// Eight aligned bytes arrive at once, with everything before them visible: PCIe writes of a device are not torn, and
// those of one connection stay in order.
void Nic::Deliver(unsigned char* to, const unsigned char* from, std::uint64_t bytes) {
  if (bytes == sizeof(std::uint64_t) && reinterpret_cast<std::uintptr_t>(to) % sizeof(std::uint64_t) == 0) {
    std::uint64_t value;
    std::memcpy(&value, from, sizeof(value));
    Pause();
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(to), value, __ATOMIC_RELEASE);
  } else if (behaviour_.adversarial) {
    DeliverPieces(to, from, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

void Nic::DeliverPieces(unsigned char* to, const unsigned char* from, std::uint64_t bytes) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> pieces;  // offset, size
  for (std::uint64_t offset = 0; offset < bytes;) {
    const std::uint64_t size = std::min<std::uint64_t>(bytes - offset, 1 + Random(1 + bytes / 2));
    pieces.emplace_back(offset, size);
    offset += size;
  }
  std::shuffle(pieces.begin(), pieces.end(), random_);
  for (const auto& [offset, size] : pieces) {
    std::memcpy(to + offset, from + offset, size);
    Pause();
  }
}

void Nic::Pause() {
  if (behaviour_.adversarial && Random(16) == 0) std::this_thread::yield();
}

void Nic::Complete(QueuePair& qp, const Completion& completion) { qp.due.push_back(completion); }

void Nic::WriteDueCompletions(QueuePair& qp, bool all) {
  while (!qp.due.empty()) {
    const bool hold = behaviour_.adversarial && !all && qp.due.size() < kMaxDue && Random(8) != 0;
    if (hold) return;
    WriteCompletion(qp, qp.due.front());
    qp.due.pop_front();
  }
}

void Nic::WriteCompletion(QueuePair& qp, const Completion& completion) {
  const std::uint32_t read = LoadBe32(&qp.memory.cq_record[0]);
  // 24-bit counters.
  const auto unread = static_cast<std::uint32_t>(qp.cq_producer - read) & 0xffffffu;
  if (unread >= qp.memory.num_cqes) {
    Violation(qp, "the completion queue of " + std::to_string(qp.memory.num_cqes) + " has no room");
    return;
  }
  unsigned char cqe[kCqeBytes] = {};
  cqe[55] = completion.syndrome;
  cqe[56] = completion.opcode;
  cqe[57] = static_cast<unsigned char>(qp.memory.qpn >> 16);
  cqe[58] = static_cast<unsigned char>(qp.memory.qpn >> 8);
  cqe[59] = static_cast<unsigned char>(qp.memory.qpn);
  cqe[60] = static_cast<unsigned char>(completion.wqe_counter >> 8);
  cqe[61] = static_cast<unsigned char>(completion.wqe_counter);
  const std::uint8_t opcode = completion.syndrome == 0 ? kCqeRequester : kCqeRequesterError;
  const auto owner = static_cast<unsigned char>(qp.cq_producer / qp.memory.num_cqes & 1);
  cqe[63] = static_cast<unsigned char>(opcode << 4 | owner);
  unsigned char* const to = qp.memory.cqes + qp.cq_producer % qp.memory.num_cqes * kCqeBytes;
  std::uint64_t tail;
  std::memcpy(&tail, cqe + 56, sizeof(tail));
  std::memcpy(to, cqe, 56);
  __atomic_store_n(reinterpret_cast<std::uint64_t*>(to + 56), tail, __ATOMIC_RELEASE);
  ++qp.cq_producer;
}

}  // namespace lamina::nic_model
