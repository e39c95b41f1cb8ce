// Does the software NIC notice what it must? Every rule is broken once, by hand.
#include "gda_harness.h"

namespace lamina::gda_test {
namespace {

std::uint64_t At(const Memory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); }

// A queue on a NIC, and raw access to both, past the code that keeps the rules.
struct Raw {
  explicit Raw(Setup setup = {.adversarial = false}) : world(setup), target(256), source(256) {
    target_keys = world.b.nic.Register(target.data(), target.size(), At(target), true);
    source_keys = world.a.nic.Register(source.data(), source.size(), At(source), false);
    world.Start();
  }

  Write GoodWrite() const {
    return WriteFrom(At(target), target_keys.rkey, At(source), source_keys.lkey, 64);
  }

  Wqe GoodWqe(std::uint64_t index = 0) const { return BuildWqe(GoodWrite(), index, world.a.queue.qpn, true); }

  void SetRecord(std::uint32_t value) { cuda::StoreReleaseSystem(&world.a.record[1], value); }

  // Rings, and waits until the NIC has looked and is done with `completions` CQEs.
  void Ring(std::uint64_t value) {
    const std::uint64_t before = world.a.nic.doorbells();
    cuda::StoreMmio64(&world.a.doorbell, value);
    Until([&] { return world.a.nic.doorbells() > before; });
  }

  void PostOne(const Wqe& wqe, std::uint64_t index = 0) {
    StoreWqe(world.a.queue, index, wqe);
    SetRecord(SendRecordValue(index + 1));
    Ring(DoorbellValue(WqeAt(world.a.queue, index)));
  }

  // Of the completion that comes; 0 if it is a success.
  std::uint32_t Syndrome() {
    Until([&] { return PollCompletion(world.a.queue); });
    return ErrorOf(world.a.queue) & 0xff;
  }

  void ExpectViolation(const std::string& part) {
    world.a.nic.Stop();
    const auto violations = world.a.nic.violations();
    Check(!violations.empty(), "a violation: " + part);
    if (!violations.empty()) CheckHas(violations[0], part);
  }

  World world;
  Memory target, source;
  nic_model::MemoryKeys target_keys, source_keys;
};

void GoodOne() {
  Raw raw;
  Fill(raw.source.data(), 64, 5);
  raw.PostOne(raw.GoodWqe());
  Check(raw.Syndrome() == 0, "a good WQE succeeds");
  Check(std::memcmp(raw.source.data(), raw.target.data(), 64) == 0 && raw.target.data()[64] == 0, "64 bytes arrived");
  CheckClean(raw.world);
}

void DoorbellBeforeRecord() {
  Raw raw;
  StoreWqe(raw.world.a.queue, 0, raw.GoodWqe());
  raw.Ring(DoorbellValue(raw.world.a.wqes.data()));
  raw.SetRecord(SendRecordValue(1));
  raw.ExpectViolation("the doorbell rang for WQE 0 before the doorbell record covered it (0)");
}

void RecordBeforeWqe() {
  Raw raw;
  // A queue of 16, once around: its entries still hold the WQEs of the round before.
  for (std::uint64_t i = 0; i < 16; ++i) {
    raw.PostOne(raw.GoodWqe(i), i);
    Check(raw.Syndrome() == 0, "the round before");
  }
  raw.SetRecord(SendRecordValue(17));
  const Wqe next = raw.GoodWqe(16);
  raw.Ring(DoorbellValue(&next));
  Check(raw.Syndrome() == kLocalOperationError, "a WQE of the round before");
  raw.ExpectViolation("WQE 16: its index is 0");
}

void Doorbells() {
  const auto with = [](auto prepare, const std::string& part) {
    Raw raw;
    StoreWqe(raw.world.a.queue, 0, raw.GoodWqe());
    raw.SetRecord(SendRecordValue(1));
    std::uint64_t value = DoorbellValue(raw.world.a.wqes.data());
    prepare(raw, reinterpret_cast<unsigned char*>(&value));
    raw.Ring(value);
    raw.ExpectViolation(part);
  };
  with([](Raw&, unsigned char* bell) { bell[6] ^= 1; }, "the doorbell names queue pair");
  with([](Raw&, unsigned char* bell) { bell[3] = 0; }, "not the start of an RDMA WRITE");
  with([](Raw& raw, unsigned char*) { raw.SetRecord(cuda::SwapBytes32(0x10001)); }, "reserved bits");
  with([](Raw& raw, unsigned char*) { raw.SetRecord(1); }, "reserved bits");  // not big-endian
  with([](Raw& raw, unsigned char*) { raw.SetRecord(SendRecordValue(17)); }, "covers 17 WQEs of a queue of 16");
}

void RecordBackwards() {
  Raw raw;
  raw.PostOne(raw.GoodWqe(0), 0);
  raw.PostOne(raw.GoodWqe(1), 1);
  raw.SetRecord(SendRecordValue(1));
  raw.Ring(DoorbellValue(raw.world.a.wqes.data()));
  raw.ExpectViolation("ran backwards to 1");
}

// One byte of a good WQE changed.
void Fields() {
  struct Change {
    std::size_t at;
    unsigned char value;
    const char* part;
  };
  const Change changes[] = {{1, 1, "its index is 256"},
                            {2, 1, "its index is 1"},
                            {4, 0x55, "its queue pair is"},
                            {8, 1, "signature"},
                            {9, 1, "stream"},
                            {11, 0x09, "fm_ce_se 9"},
                            {11, 0x88, "fm_ce_se 136"},
                            {15, 1, "imm"},
                            {31, 1, "reserved word"}};
  for (const Change& change : changes) {
    Raw raw;
    Wqe wqe = raw.GoodWqe();
    reinterpret_cast<unsigned char*>(&wqe)[change.at] = change.value;
    StoreWqe(raw.world.a.queue, 0, wqe);
    raw.SetRecord(SendRecordValue(1));
    const Wqe good = raw.GoodWqe();
    raw.Ring(DoorbellValue(&good));
    Check(raw.Syndrome() == kLocalOperationError, change.part);
    raw.ExpectViolation(change.part);
  }
}

void OpcodeAndSize() {
  struct Change {
    std::size_t at;
    unsigned char value;
    const char* part;
  };
  const Change changes[] = {{0, 1, "opmod 1"}, {3, 0x0a, "opcode 10 is not RDMA WRITE"}, {7, 4, "ds 4 is not 3"}};
  for (const Change& change : changes) {
    Raw raw;
    Wqe wqe = raw.GoodWqe();
    reinterpret_cast<unsigned char*>(&wqe)[change.at] = change.value;
    StoreWqe(raw.world.a.queue, 0, wqe);
    raw.SetRecord(SendRecordValue(1));
    const Wqe good = raw.GoodWqe();
    raw.Ring(DoorbellValue(&good));
    Check(raw.Syndrome() == kLocalOperationError, change.part);
    raw.ExpectViolation(change.part);
  }
  for (const std::uint32_t bytes : {0u, 13u}) {
    Raw raw;
    Write write = raw.GoodWrite();
    write.is_inline = bytes != 0;
    write.bytes = bytes;
    raw.PostOne(BuildWqe(write, 0, raw.world.a.queue.qpn, true));
    Check(raw.Syndrome() == kLocalOperationError, "size");
    raw.ExpectViolation(bytes == 0 ? "byte_count is 0" : "13 bytes inline");
  }
}

// Keys and bounds end in error completions, as on the hardware, and touch no memory.
void Access() {
  const auto with = [](auto change, std::uint32_t syndrome, const std::string& what) {
    Raw raw;
    Fill(raw.source.data(), 256, 5);
    Write write = raw.GoodWrite();
    change(raw, write);
    raw.PostOne(BuildWqe(write, 0, raw.world.a.queue.qpn, false));  // errors complete even if not asked to
    Check(raw.Syndrome() == syndrome, what);
    raw.world.a.nic.Stop();
    for (std::size_t i = 0; i < raw.target.size(); ++i) Check(raw.target.data()[i] == 0, what + " touches memory");
    CheckClean(raw.world);
  };
  with([](Raw& raw, Write& w) { w.lkey = raw.source_keys.rkey; }, kLocalProtectionError, "rkey as lkey");
  with([](Raw& raw, Write& w) { w.rkey = raw.target_keys.lkey; }, kRemoteAccessError, "lkey as rkey");
  with([](Raw&, Write& w) { w.local += 193; }, kLocalProtectionError, "end of the source");
  with([](Raw&, Write& w) { w.remote += 193; }, kRemoteAccessError, "end of the target");
  with([](Raw&, Write& w) { w.remote -= 1; }, kRemoteAccessError, "before the target");
  with([](Raw&, Write& w) { w.bytes = kMaxBytes; }, kLocalProtectionError, "2 GB");
  with(
      [](Raw& raw, Write& w) {
        w.remote = At(raw.source);
        w.rkey = raw.source_keys.rkey;
      },
      kRemoteAccessError, "a key of the wrong NIC");
}

void NoRemoteWrite() {
  World world({.adversarial = false});
  Memory target(64);
  const auto keys = world.b.nic.Register(target.data(), 64, At(target), false);
  world.Start();
  const Write write = WriteValue(At(target), keys.rkey, 7);
  Check(Post(world.a.queue, &write, 1, cuda::NowNs() + 10'000'000'000) == kOk, "post");
  Until([&] { return PollCompletion(world.a.queue); });
  Check((ErrorOf(world.a.queue) & 0xff) == kRemoteAccessError, "not registered for remote writes");
  CheckClean(world);
}

// After an error the queue pair only flushes.
void Flush() {
  Raw raw;
  Write bad = raw.GoodWrite();
  bad.rkey ^= 0x100;
  raw.PostOne(BuildWqe(bad, 0, raw.world.a.queue.qpn, true), 0);
  Check(raw.Syndrome() == kRemoteAccessError, "the error");
  raw.PostOne(raw.GoodWqe(1), 1);
  Until([&] { return PollCompletion(raw.world.a.queue); });
  raw.world.a.nic.Stop();
  Check(static_cast<unsigned char>(raw.world.a.cqes.data()[64 + kCqeSyndromeOffset]) == kFlushed, "then flushed");
  Check(raw.world.a.nic.writes() == 0, "nothing is written");
  CheckClean(raw.world);
}

void CompletionOverrun() {
  Raw raw;
  for (std::uint64_t i = 0; i < 17; ++i) raw.PostOne(raw.GoodWqe(i), i);
  Until([&] { return !raw.world.a.nic.violations().empty(); });
  raw.ExpectViolation("the completion queue of 16 has no room");
}

}  // namespace
}  // namespace lamina::gda_test

int main(int argc, char** argv) {
  using namespace lamina::gda_test;
  return RunCases({{"good_one", GoodOne},
                   {"doorbell_before_record", DoorbellBeforeRecord},
                   {"record_before_wqe", RecordBeforeWqe},
                   {"doorbells", Doorbells},
                   {"record_backwards", RecordBackwards},
                   {"fields", Fields},
                   {"opcode_and_size", OpcodeAndSize},
                   {"access", Access},
                   {"no_remote_write", NoRemoteWrite},
                   {"flush", Flush},
                   {"completion_overrun", CompletionOverrun}},
                  argc, argv);
}
