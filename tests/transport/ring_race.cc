// Two threads pass messages through a ring of two slots, under ThreadSanitizer, which follows addresses: so mmap is
// wrapped (-Wl,--wrap=mmap) to give both ends the same one.
#include <sys/mman.h>

#include <cstdio>
#include <thread>

#include "shm_channel.h"

namespace {

constexpr int kMessages = 20000;
constexpr std::uint64_t kWords = 48;

void* mapped = nullptr;
int mappings = 0;

lamina::Message Describe(int i) {
  lamina::Message message;
  message.tag = 1;
  message.step = i;
  message.num_tensors = 1;
  message.payload_bytes = kWords * sizeof(std::uint64_t);
  return message;
}

bool Check(const lamina::Status& status) {
  if (!status.ok()) std::printf("%s\n", status.text.c_str());
  return status.ok();
}

void Write(lamina::ShmChannel& channel) {
  for (int i = 0; i < kMessages; ++i) {
    char* payload = nullptr;
    if (!Check(channel.Reserve(Describe(i), &payload))) return;
    for (std::uint64_t word = 0; word < kWords; ++word) reinterpret_cast<std::uint64_t*>(payload)[word] = i + word;
    channel.Publish();
  }
}

int Read(lamina::ShmChannel& channel) {
  int good = 0;
  for (int i = 0; i < kMessages; ++i) {
    const char* payload = nullptr;
    if (!Check(channel.Peek(Describe(i), &payload))) return good;
    bool same = true;
    for (std::uint64_t word = 0; word < kWords; ++word) {
      same &= reinterpret_cast<const std::uint64_t*>(payload)[word] == i + word;
    }
    good += same;
    channel.Release();
  }
  return good;
}

}  // namespace

extern "C" void* __real_mmap(void*, size_t, int, int, int, off_t);
extern "C" int __real_munmap(void*, size_t);

extern "C" void* __wrap_mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (mappings++ == 0) mapped = __real_mmap(at, bytes, protection, flags, fd, offset);
  return mapped;
}

extern "C" int __wrap_munmap(void* at, size_t bytes) { return --mappings == 0 ? __real_munmap(at, bytes) : 0; }

int main() {
  using lamina::Role;
  const std::uint64_t bytes = kWords * sizeof(std::uint64_t);
  const auto writer = lamina::ShmChannel::Create({Role::kWriter, "the reader", 30.0, 5.0}, 2, bytes);
  const auto reader = lamina::ShmChannel::Attach({Role::kReader, "the writer", 30.0, 5.0}, writer->path(), 2, bytes);
  std::thread thread([&] { Write(*writer); });
  const int good = Read(*reader);
  thread.join();

  // An abort from a third thread while the reader waits.
  std::thread aborting([&] { writer->Abort(); });
  const char* payload = nullptr;
  const bool aborted = reader->Peek(Describe(0), &payload).code == lamina::Code::kAborted;
  aborting.join();
  std::printf("%d messages, aborted: %d\n", good, aborted);
  return good == kMessages && aborted ? 0 : 1;
}
