// Two ends of `gda` channels on one CPU: software NICs, the memory that a driver would set up, and channels between.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gda_channel.h"
#include "gda_failure.h"
#include "gda_proxy_thread.h"
#include "nic_model/nic.h"
#include "operations.h"

namespace lamina::gda_test {

using namespace lamina::cuda::gda;
using lamina::cuda::FailureRecord;
using lamina::cuda::Reason;
using nic_model::Nic;

// Of waits that should succeed; less where failures are what is expected.
inline double PatientS() {
  static const char* const text = std::getenv("GDA_PATIENT_S");
  return text == nullptr ? 60.0 : std::atof(text);
}
constexpr double kHastyS = 0.05;  // of waits that should not

// Zeroed, on a cache line, exactly as long as asked for, so that AddressSanitizer sees the end of it.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes), data_(new (std::align_val_t{64}) char[bytes]()) {}
  ~Memory() { operator delete[](data_, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  const std::size_t bytes_;
  char* const data_;
};

struct Setup {
  std::uint32_t seed = 1;
  bool adversarial = true;
  bool use_proxy = false;
  std::uint32_t log_num_wqes = 4;
};

// A process: a NIC with one queue pair, its queues, and the CPU proxy if there is one.
struct Endpoint {
  explicit Endpoint(const Setup& setup, std::uint32_t qpn)
      : nic({setup.seed * 2 + qpn, setup.adversarial}),
        wqes(kWqeBytes << setup.log_num_wqes),
        cqes(kCqeBytes << setup.log_num_wqes),
        entries(sizeof(ProxyEntry) << setup.log_num_wqes) {
    // As a driver does: no entry has been written yet.
    for (std::size_t i = 63; i < cqes.size(); i += kCqeBytes) cqes.data()[i] = static_cast<char>(kCqeInvalid << 4);
    queue.wqes = wqes.data();
    queue.cqes = cqes.data();
    queue.record = record;
    queue.cq_record = cq_record;
    queue.doorbell = &doorbell;
    queue.state = &state;
    queue.log_num_wqes = queue.log_num_cqes = setup.log_num_wqes;
    queue.qpn = qpn;
    proxy.entries = reinterpret_cast<ProxyEntry*>(entries.data());
    proxy.words = &words;
    proxy.reserved = &reserved;
    proxy.log_num_entries = setup.log_num_wqes;
  }

  // WRITEs handed out for posting so far.
  std::uint64_t asked() {
    return cuda::LoadAcquireSystem(proxy_thread == nullptr ? &state.reserved : &reserved);
  }

  void Connect(Endpoint& peer) {
    nic.AddQueuePair({queue.qpn, reinterpret_cast<unsigned char*>(wqes.data()), 1u << queue.log_num_wqes, record,
                      &doorbell, reinterpret_cast<unsigned char*>(cqes.data()), 1u << queue.log_num_cqes, cq_record},
                     &peer.nic);
  }

  Nic nic;
  Memory wqes, cqes, entries;
  std::uint32_t record[2] = {}, cq_record[2] = {};
  std::uint64_t doorbell = 0, reserved = 0;
  QueueState state{};
  ProxyWords words{};
  SendQueue queue{};
  ProxyQueue proxy{};
  std::unique_ptr<ProxyThread> proxy_thread;
};

// One end of one channel.
struct Half {
  Half(Endpoint& endpoint, Role role, std::uint32_t num_slots, std::uint64_t slot_bytes, bool use_proxy)
      : region(RegionBytes(num_slots, slot_bytes)),
        nic_address(role == Role::kWriter ? 0 : reinterpret_cast<std::uintptr_t>(region.data())),
        keys(endpoint.nic.Register(region.data(), region.size(), nic_address, true)) {
    static std::uint64_t ids = 0;
    end.id = ++ids;
    end.region = region.data();
    end.nic_region = nic_address;
    end.slot_bytes = slot_bytes;
    end.stop = &stop;
    end.record = &record;
    end.lkey = keys.lkey;
    end.num_slots = num_slots;
    end.role = role;
    end.queue = endpoint.queue;
    end.proxy = endpoint.proxy;
    end.use_proxy = use_proxy;
    SetTimeout(PatientS());
  }

  void SetTimeout(double seconds) {
    timeout_s = seconds;
    end.timeout_ns = static_cast<std::uint64_t>(seconds * 1e9);
  }

  void SetPeer(const Half& peer) {
    end.peer_region = peer.nic_address;
    end.peer_rkey = peer.keys.rkey;
  }

  std::string failure() const {
    return FailureText(record, end.role, end.role == Role::kWriter ? "the reader" : "the writer", timeout_s);
  }

  Memory region;
  std::uint64_t nic_address;  // 0, as of a dmabuf, or where the memory is
  nic_model::MemoryKeys keys;
  std::uint64_t stop = 0;
  FailureRecord record{};
  End end{};
  double timeout_s = 0;
};

struct Channel {
  Channel(Endpoint& from, Endpoint& to, std::uint32_t num_slots, std::uint64_t slot_bytes, bool use_proxy)
      : writer(from, Role::kWriter, num_slots, AlignToLine(slot_bytes), use_proxy),
        reader(to, Role::kReader, num_slots, AlignToLine(slot_bytes), use_proxy) {
    writer.SetPeer(reader);
    reader.SetPeer(writer);
  }
  Half writer, reader;
};

// Two endpoints with channels both ways over one queue pair each.
class World {
 public:
  explicit World(Setup setup = {}) : setup_(setup), a(setup, 0x123456), b(setup, 0x0000ff) {
    a.Connect(b);
    b.Connect(a);
  }
  ~World() {
    // Proxies post to the NICs until they end.
    a.proxy_thread.reset();
    b.proxy_thread.reset();
    // And NICs deliver to both ends until they stop.
    a.nic.Stop();
    b.nic.Stop();
  }

  Channel& AddChannel(std::uint32_t num_slots, std::uint64_t slot_bytes, bool from_a = true) {
    channels_.push_back(std::make_unique<Channel>(from_a ? a : b, from_a ? b : a, num_slots, slot_bytes,
                                                  setup_.use_proxy));
    return *channels_.back();
  }

  void Start() {
    a.nic.Start();
    b.nic.Start();
    if (!setup_.use_proxy) return;
    a.proxy_thread = std::make_unique<ProxyThread>(a.proxy, a.queue);
    b.proxy_thread = std::make_unique<ProxyThread>(b.proxy, b.queue);
  }

 private:
  const Setup setup_;

 public:
  Endpoint a, b;

 private:
  std::vector<std::unique_ptr<Channel>> channels_;
};

// A block of one thread.
struct Block {
  std::uint32_t number = 0, blocks_ = 1;
  bool leader() const { return true; }
  std::uint32_t blocks() const { return blocks_; }
  std::uint64_t index() const { return number; }
  std::uint64_t count() const { return blocks_; }
  void Sync() const {}
  bool Any(bool x) const { return x; }
};

struct Stamp {
  std::int32_t words[3];
};

using Tensors = std::vector<std::pair<char*, std::uint64_t>>;

inline Call MakeCall(const std::vector<End*>& ends, std::int32_t tag, const Stamp& stamp, Stamp& out,
                     const Tensors& tensors, std::uint64_t dtype = 7) {
  Call call{};
  call.stamp = stamp.words;
  call.stamp_out = out.words;
  call.tag = tag;
  for (End* end : ends) {
    call.ends[call.num_ends] = end;
    call.ids[call.num_ends++] = end->id;
  }
  for (const auto& [data, bytes] : tensors) {
    call.tensors[call.num_tensors++] = {data, bytes};
    call.payload_bytes += AlignToLine(bytes);
    call.layout = LayoutOf(call.layout, dtype, bytes);
  }
  return call;
}

inline void SendOne(Half& half, const Stamp& stamp, const Tensors& tensors, std::int32_t tag = 1) {
  Stamp out;
  Send(MakeCall({&half.end}, tag, stamp, out, tensors), Block{});
}

inline void RecvOne(Half& half, const Stamp& stamp, const Tensors& tensors, std::int32_t tag = 1) {
  Stamp out;
  Recv(MakeCall({&half.end}, tag, stamp, out, tensors), Block{});
}

// Bytes that depend on message and position, so that a mix-up shows.
inline void Fill(char* data, std::uint64_t bytes, std::uint64_t seed) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15 + 1;
  for (std::uint64_t i = 0; i < bytes; ++i) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    data[i] = static_cast<char>(x);
  }
}

// --- Reporting ------------------------------------------------------------------------------------------------------

inline int& Failures() {
  static int failures = 0;
  return failures;
}

inline void Check(bool holds, const std::string& what) {
  if (holds) return;
  ++Failures();
  std::cout << "FAILED " << what << std::endl;
}

inline void CheckEqual(const std::string& got, const std::string& expected) {
  Check(got == expected, "expected \"" + expected + "\", got \"" + got + "\"");
}

inline void CheckHas(const std::string& text, const std::string& part) {
  Check(text.find(part) != std::string::npos, "expected \"" + part + "\" in \"" + text + "\"");
}

inline void CheckClean(const World& world) {
  for (const Nic* nic : {&world.a.nic, &world.b.nic}) {
    for (const std::string& violation : nic->violations()) Check(false, "violation: " + violation);
  }
}

// Waits for what another thread will do, however long the machine takes; a hang is the test runner's to end.
template <typename Done>
void Until(Done done) {
  while (!done()) std::this_thread::yield();
}

struct Case {
  const char* name;
  std::function<void()> run;
};

// Runs the case named in argv, or all of them; prints a line for each.
inline int RunCases(const std::vector<Case>& cases, int argc, char** argv) {
  for (const Case& one : cases) {
    if (argc > 1 && std::string(argv[1]) != one.name) continue;
    const int before = Failures();
    const auto start = cuda::NowNs();
    one.run();
    std::cout << (Failures() == before ? "ok " : "FAILED ") << one.name << std::endl;
    std::cerr << one.name << ": " << (cuda::NowNs() - start) / 1000000 << " ms" << std::endl;
  }
  return Failures() == 0 ? 0 : 1;
}

}  // namespace lamina::gda_test
