// The code that a GPU runs at its end of a channel, on threads of the CPU under ThreadSanitizer: each block of a kernel
// is a thread. At the other end is the CPU's own ShmChannel, or the GPU's code again. As in ring_race.cc, mmap is wrapped
// to give both ends the same addresses.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "cuda/operations.h"
#include "cuda/transport.h"
#include "shm_channel.h"

namespace {

using lamina::Message;
using lamina::Role;
using lamina::ShmChannel;
using lamina::cuda::Call;
using lamina::cuda::End;
using lamina::cuda::FailureRecord;
using lamina::cuda::Reason;

constexpr int kMessages = 1500;
constexpr std::uint32_t kBlocks = 3;
constexpr std::uint64_t kSlotBytes = 8192;
constexpr std::uint64_t kLongNs = 30'000'000'000;

void* mapped = nullptr;
int mappings = 0;
int failures = 0;

void Expect(bool fine, const char* what, int line) {
  if (fine) return;
  std::printf("line %d: not so: %s\n", line, what);
  ++failures;
}
#define EXPECT(what) Expect(what, #what, __LINE__)

// A block of one thread.
struct Block {
  std::uint32_t block;
  bool leader() const { return true; }
  std::uint32_t blocks() const { return kBlocks; }
  std::uint64_t index() const { return block; }
  std::uint64_t count() const { return kBlocks; }
  void Sync() const {}
  bool Any(bool mine) const { return mine; }
};

// What DeviceEnd sets up in memory of a GPU.
struct Gpu {
  std::shared_ptr<ShmChannel> ring;
  FailureRecord record{};
  End end{};
  std::int32_t stamp[3] = {};

  Gpu(std::shared_ptr<ShmChannel> channel, Role role, std::uint64_t timeout_ns = kLongNs) : ring(std::move(channel)) {
    end.id = 7;
    end.ring = ring->ring();
    end.slots = ring->memory() + sizeof(lamina::RingHeader);
    end.record = &record;
    end.slot_bytes = ring->slot_bytes();
    end.num_slots = ring->num_slots();
    end.timeout_ns = timeout_ns;
    end.role = role;
  }

  Call CallOf(Message message, const std::vector<lamina::cuda::Tensor>& tensors, std::int32_t* stamp_out) {
    Call call{};
    stamp[0] = message.step;
    stamp[1] = message.layer;
    stamp[2] = message.batch;
    call.stamp = stamp;
    call.stamp_out = stamp_out;
    call.tag = message.tag;
    call.layout = message.layout;
    call.num_ends = 1;
    call.ends[0] = &end;
    call.ids[0] = 7;
    for (const auto& tensor : tensors) {
      call.tensors[call.num_tensors++] = tensor;
      call.payload_bytes += lamina::AlignToLine(tensor.bytes);
    }
    return call;
  }

  // A kernel: returns when all its blocks have.
  void Run(const Message& message, const std::vector<lamina::cuda::Tensor>& tensors) {
    std::int32_t stamp_out[3] = {-1, -1, -1};
    const Call call = CallOf(message, tensors, stamp_out);
    std::vector<std::thread> blocks;
    for (std::uint32_t i = 0; i < kBlocks; ++i) {
      blocks.emplace_back([&, i] {
        if (end.role == Role::kWriter) {
          lamina::cuda::Send(call, Block{i});
        } else {
          lamina::cuda::Recv(call, Block{i});
        }
      });
    }
    for (std::thread& block : blocks) block.join();
    EXPECT(std::memcmp(stamp, stamp_out, sizeof(stamp)) == 0);
  }

  Reason reason() const { return static_cast<Reason>(record.reason); }
};

// Two tensors of odd sizes, the second at an odd address.
struct Letter {
  std::vector<char> first, second;
  std::vector<lamina::cuda::Tensor> tensors;
  Message message;

  explicit Letter(int i) : first(3001), second(501 + 1) {
    tensors = {{first.data(), first.size()}, {second.data() + 1, second.size() - 1}};
    message.tag = 1;
    message.step = i;
    message.layout = 99;
    message.num_tensors = 2;
    message.payload_bytes = lamina::AlignToLine(3001) + lamina::AlignToLine(501);
  }

  void Fill() {
    for (std::size_t k = 0; k < first.size(); ++k) first[k] = static_cast<char>(message.step * 7 + k);
    for (std::size_t k = 1; k < second.size(); ++k) second[k] = static_cast<char>(message.step * 13 + k);
  }

  bool Good() const {
    Letter same(message.step);
    same.Fill();
    return first == same.first && std::memcmp(second.data() + 1, same.second.data() + 1, second.size() - 1) == 0;
  }
};

struct Ring {
  std::shared_ptr<ShmChannel> writer, reader;
  Ring() {
    writer = ShmChannel::Create({Role::kWriter, "the reader", 30.0, 5.0, true}, 2, kSlotBytes);
    reader = ShmChannel::Attach({Role::kReader, "the writer", 30.0, 5.0}, writer->path(), 2, kSlotBytes);
  }
};

void SendOnCpu(ShmChannel& channel, Letter letter) {
  letter.Fill();
  char* payload = nullptr;
  const lamina::Status status = channel.Reserve(letter.message, &payload);
  EXPECT(status.ok());
  if (!status.ok()) return;
  std::memcpy(payload, letter.first.data(), letter.first.size());
  std::memcpy(payload + lamina::AlignToLine(3001), letter.second.data() + 1, letter.second.size() - 1);
  channel.Publish();
}

bool RecvOnCpu(ShmChannel& channel, int i) {
  Letter letter(i);
  const char* payload = nullptr;
  if (!channel.Peek(letter.message, &payload).ok()) return false;
  std::memcpy(letter.first.data(), payload, letter.first.size());
  std::memcpy(letter.second.data() + 1, payload + lamina::AlignToLine(3001), letter.second.size() - 1);
  channel.Release();
  return letter.Good();
}

void SendOnGpu(Gpu& gpu, int i) {
  Letter letter(i);
  letter.Fill();
  gpu.Run(letter.message, letter.tensors);
}

bool RecvOnGpu(Gpu& gpu, int i) {
  Letter letter(i);
  gpu.Run(letter.message, letter.tensors);
  return letter.Good();
}

void Exchange(const std::function<void(int)>& send, const std::function<bool(int)>& recv) {
  std::thread writing([&] {
    for (int i = 0; i < kMessages; ++i) send(i);
  });
  int good = 0;
  for (int i = 0; i < kMessages; ++i) good += recv(i);
  writing.join();
  EXPECT(good == kMessages);
}

void GpuToCpu() {
  Ring ring;
  Gpu gpu(ring.writer, Role::kWriter);
  Exchange([&](int i) { SendOnGpu(gpu, i); }, [&](int i) { return RecvOnCpu(*ring.reader, i); });
  EXPECT(gpu.reason() == Reason::kNone && gpu.end.next == kMessages);
}

void CpuToGpu() {
  Ring ring;
  Gpu gpu(ring.reader, Role::kReader);
  Exchange([&](int i) { SendOnCpu(*ring.writer, Letter(i)); }, [&](int i) { return RecvOnGpu(gpu, i); });
  EXPECT(gpu.reason() == Reason::kNone && gpu.end.next == kMessages);
}

void GpuToGpu() {
  Ring ring;
  Gpu there(ring.writer, Role::kWriter), here(ring.reader, Role::kReader);
  Exchange([&](int i) { SendOnGpu(there, i); }, [&](int i) { return RecvOnGpu(here, i); });
  EXPECT(there.reason() == Reason::kNone && here.reason() == Reason::kNone);
}

void Timeouts() {
  Ring ring;
  Gpu reader(ring.reader, Role::kReader, 20'000'000), writer(ring.writer, Role::kWriter, 20'000'000);
  RecvOnGpu(reader, 12);
  EXPECT(reader.reason() == Reason::kTimeout && reader.record.expected.step == 12 && reader.record.expected.tag == 1);
  for (int i = 0; i < 3; ++i) SendOnGpu(writer, i);
  EXPECT(writer.reason() == Reason::kTimeout && writer.record.expected.step == 2 && writer.end.next == 2);
  // The first failure is final: there is a message, but nothing looks at it, and the record stays.
  EXPECT(!RecvOnGpu(reader, 0));
  EXPECT(reader.end.next == 0 && reader.record.expected.step == 12);
}

void StopsWhileWaiting() {
  const struct {
    Role stopped_by;
    bool abort;
    Reason reason;
  } cases[] = {{Role::kReader, true, Reason::kAborted},
               {Role::kReader, false, Reason::kClosed},
               {Role::kWriter, true, Reason::kPeerAborted},
               {Role::kWriter, false, Reason::kPeerClosed}};
  for (const auto& stop : cases) {
    Ring ring;
    Gpu gpu(ring.reader, Role::kReader);
    std::thread stopping([&] {
      ShmChannel& end = stop.stopped_by == Role::kWriter ? *ring.writer : *ring.reader;
      stop.abort ? end.Abort() : end.Close();
    });
    EXPECT(!RecvOnGpu(gpu, 3));
    stopping.join();
    EXPECT(gpu.reason() == stop.reason && gpu.record.expected.step == 3);
  }
}

void WhatWasSentIsDelivered() {
  for (const bool died : {false, true}) {
    Ring ring;
    Gpu gpu(ring.reader, Role::kReader);
    SendOnCpu(*ring.writer, Letter(0));
    died ? ring.reader->Stop(lamina::DiedBit(Role::kWriter)) : ring.writer->Close();
    EXPECT(RecvOnGpu(gpu, 0));
    EXPECT(!RecvOnGpu(gpu, 1));
    EXPECT(gpu.reason() == (died ? Reason::kPeerDied : Reason::kPeerClosed) && gpu.record.expected.step == 1);
  }
}

// An operation that need not wait fails as well.
void StoppedBefore() {
  Ring ring;
  Gpu gpu(ring.writer, Role::kWriter);
  ring.reader->Close();
  SendOnGpu(gpu, 4);
  EXPECT(gpu.reason() == Reason::kPeerClosed && gpu.end.next == 0);
}

void UnexpectedMessage() {
  Ring ring;
  Gpu gpu(ring.reader, Role::kReader);
  SendOnCpu(*ring.writer, Letter(5));
  EXPECT(!RecvOnGpu(gpu, 6));
  EXPECT(gpu.reason() == Reason::kMessage && gpu.end.next == 0);
  EXPECT(lamina::Difference(gpu.record.expected, gpu.record.got) ==
         "it is not the message that was expected: expected step 6, got 5");
}

void BatchWithoutChannel() {
  for (const int batch : {-1, 1}) {
    Ring ring;
    Gpu gpu(ring.writer, Role::kWriter);
    Letter letter(0);
    letter.message.batch = batch;
    gpu.Run(letter.message, letter.tensors);
    EXPECT(gpu.reason() == Reason::kNoChannel && gpu.record.got.batch == 1 && gpu.record.expected.batch == batch);
  }
}

void ClosedEnd() {
  Ring ring;
  Gpu gpu(ring.writer, Role::kWriter);
  gpu.end = End{};  // as the host leaves it, with no address in it
  SendOnGpu(gpu, 0);
  EXPECT(gpu.end.next == 0);
}

void TooLarge() {
  Ring ring;
  Gpu gpu(ring.writer, Role::kWriter);
  std::vector<char> bytes(kSlotBytes + 1);
  gpu.Run(Letter(0).message, {{bytes.data(), bytes.size()}});
  EXPECT(gpu.reason() == Reason::kTooLarge && gpu.record.expected.payload_bytes == kSlotBytes + lamina::kLine);
}

}  // namespace

extern "C" void* __real_mmap(void*, size_t, int, int, int, off_t);
extern "C" int __real_munmap(void*, size_t);

// Only the shared memory, and not what new threads take for their stacks.
extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (fd < 0) return __real_mmap(at, bytes, protection, flags, fd, offset);
  if (mappings++ == 0) mapped = __real_mmap(at, bytes, protection, flags, fd, offset);
  return mapped;
}

extern "C" int __wrap_munmap(void* at, size_t bytes) {
  if (at != mapped) return __real_munmap(at, bytes);
  return --mappings == 0 ? __real_munmap(at, bytes) : 0;
}

int main() {
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"GpuToCpu", GpuToCpu},
               {"CpuToGpu", CpuToGpu},
               {"GpuToGpu", GpuToGpu},
               {"Timeouts", Timeouts},
               {"StopsWhileWaiting", StopsWhileWaiting},
               {"WhatWasSentIsDelivered", WhatWasSentIsDelivered},
               {"StoppedBefore", StoppedBefore},
               {"UnexpectedMessage", UnexpectedMessage},
               {"BatchWithoutChannel", BatchWithoutChannel},
               {"ClosedEnd", ClosedEnd},
               {"TooLarge", TooLarge}};
  for (const auto& test : tests) {
    const int before = failures;
    test.run();
    std::printf("%s: %s\n", test.name, failures == before ? "good" : "BAD");
  }
  return failures == 0 ? 0 : 1;
}
