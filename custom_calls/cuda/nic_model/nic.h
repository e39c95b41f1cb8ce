// A software mlx5 NIC, for tests: it reads send queues, doorbell records and doorbells as the hardware does, performs
// the RDMA WRITEs it finds there, and writes completions.
//
// It is stricter than the hardware. Whatever the hardware would have to guess, tolerate or punish later is a
// *violation*, which tests assert the absence of:
//   - a doorbell for another queue pair, or for a WQE that the doorbell record does not cover yet, or a record that
//     runs backwards, covers more than the queue holds, or has reserved bits set;
//   - a WQE that does not carry its own position, or another opcode, size or queue pair than it must, or a reserved
//     field that is not zero; WRITEs of zero bytes;
//   - a completion queue without room for a completion that is due.
// It is also adversarial where the hardware is free: within one WRITE the bytes arrive in pieces of random size, in
// random order and with pauses; completions are held back and come late; only WQEs of one queue pair stay in order.
//
// Nothing here comes from the code under test: layouts are spelled out again in nic.cc.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace lamina::nic_model {

struct MemoryKeys {
  std::uint32_t lkey;
  std::uint32_t rkey;
};

// What the driver of a NIC would tell it about a queue pair. All addresses are the host's.
struct QueuePairMemory {
  std::uint32_t qpn;
  const unsigned char* wqes;
  std::uint32_t num_wqes;
  const std::uint32_t* record;    // the doorbell record of the queue pair, both words
  const std::uint64_t* doorbell;  // the register that rings
  unsigned char* cqes;
  std::uint32_t num_cqes;
  const std::uint32_t* cq_record;
};

struct Behaviour {
  std::uint32_t seed = 1;
  bool adversarial = true;  // pieces, random order, pauses, late completions
};

// What happens to WRITEs from now on.
enum class Link : std::uint32_t {
  kUp,
  kDown,    // retries run out: an error completion, and the queue pair is in the error state
  kStalled  // nothing happens at all: no WRITE, no completion
};

class Nic {
 public:
  explicit Nic(Behaviour behaviour);
  ~Nic();
  Nic(const Nic&) = delete;
  Nic& operator=(const Nic&) = delete;

  // Before Start.
  // WQEs name the memory by addresses from `nic_address` on, which need not be where it is.
  MemoryKeys Register(void* memory, std::uint64_t bytes, std::uint64_t nic_address, bool remote_write);
  void AddQueuePair(const QueuePairMemory& memory, Nic* peer);
  void Start();

  // Returns when nothing more will be delivered. The destructor does so too.
  void Stop();

  // From any thread.
  void SetLink(Link link) { link_.store(link, std::memory_order_release); }
  std::vector<std::string> violations() const;
  std::uint64_t doorbells() const { return doorbells_.load(std::memory_order_acquire); }  // rings seen
  std::uint64_t writes() const { return writes_.load(std::memory_order_acquire); }        // WRITEs performed

 private:
  struct Region {
    unsigned char* memory;
    std::uint64_t begin;
    std::uint64_t bytes;
    MemoryKeys keys;
    bool remote_write;
  };

  struct Completion {
    std::uint16_t wqe_counter;
    std::uint8_t opcode;
    std::uint8_t syndrome;  // 0: success
  };

  struct QueuePair {
    QueuePairMemory memory;
    Nic* peer;
    std::uint64_t last_doorbell = 0;
    std::uint64_t consumer = 0;  // WQEs fetched
    std::uint64_t producer = 0;  // WQEs that the record covers
    std::uint64_t cq_producer = 0;
    bool failed = false;
    std::deque<Completion> due;
  };

  void Run();
  bool Serve(QueuePair& qp);  // whether there was anything to do
  bool LookAtDoorbell(QueuePair& qp);
  void LookAtRecord(QueuePair& qp, std::uint16_t rung);
  void Execute(QueuePair& qp);
  std::uint8_t Perform(QueuePair& qp, const unsigned char* wqe);
  std::uint8_t CheckControl(const QueuePair& qp, const unsigned char* wqe);
  void Complete(QueuePair& qp, const Completion& completion);
  void WriteDueCompletions(QueuePair& qp, bool all);
  void WriteCompletion(QueuePair& qp, const Completion& completion);

  // Where in memory those bytes are; null if the key does not cover them.
  unsigned char* Find(std::uint32_t key, bool remote, std::uint64_t address, std::uint64_t bytes) const;
  void Deliver(unsigned char* to, const unsigned char* from, std::uint64_t bytes);
  void DeliverPieces(unsigned char* to, const unsigned char* from, std::uint64_t bytes);
  void Pause();
  std::uint32_t Random(std::uint32_t below) { return static_cast<std::uint32_t>(random_() % below); }
  void Violation(const QueuePair& qp, const std::string& what);

  const Behaviour behaviour_;
  std::mt19937 random_;
  std::vector<Region> regions_;  // fixed once started
  std::vector<std::unique_ptr<QueuePair>> queue_pairs_;
  std::atomic<Link> link_{Link::kUp};
  std::atomic<std::uint64_t> doorbells_{0};
  std::atomic<std::uint64_t> writes_{0};
  std::atomic<bool> stop_{false};
  mutable std::mutex violations_mutex_;
  std::vector<std::string> violations_;
  std::thread thread_;
};

}  // namespace lamina::nic_model
