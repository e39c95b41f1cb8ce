// Two ends of a TCP channel in one process, each with its pump, under ThreadSanitizer.
#include <arpa/inet.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "tcp_channel.h"

namespace {

using lamina::Role;
using lamina::TcpChannel;
using lamina::UniqueFd;

constexpr std::uint64_t kWords = 48;
constexpr lamina::Token kToken{1, 2, 3};

struct Ends {
  std::shared_ptr<TcpChannel> writer;
  std::shared_ptr<TcpChannel> reader;
};

void Require(bool good, const char* what) {
  if (good) return;
  std::perror(what);
  std::exit(1);
}

Ends Join(std::uint32_t num_slots) {
  const auto make = [&](Role role, const char* peer) {
    return TcpChannel::Create({role, peer, 30.0, 5.0}, num_slots, kWords * sizeof(std::uint64_t));
  };
  Ends ends{make(Role::kWriter, "the reader"), make(Role::kReader, "the writer")};
  UniqueFd listener(socket(AF_INET, SOCK_STREAM, 0)), connection(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof(at);
  auto* const address = reinterpret_cast<sockaddr*>(&at);
  Require(bind(listener.get(), address, bytes) == 0 && listen(listener.get(), 1) == 0, "listen");
  Require(getsockname(listener.get(), address, &bytes) == 0, "getsockname");
  ends.reader->Accept(std::move(listener), kToken, {1, ""});
  Require(connect(connection.get(), address, bytes) == 0, "connect");
  lamina::Hello hello;
  hello.token = kToken;
  Require(send(connection.get(), &hello, sizeof(hello), 0) == sizeof(hello), "send");
  std::uint64_t welcome = 0;
  Require(recv(connection.get(), &welcome, sizeof(welcome), MSG_WAITALL) == sizeof(welcome), "recv");
  Require(welcome == lamina::kWelcome, "welcome");
  ends.writer->Connect(std::move(connection), {2, "elsewhere"});
  return ends;
}

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

void Write(TcpChannel& channel, int messages) {
  for (int i = 0; i < messages; ++i) {
    char* payload = nullptr;
    if (!Check(channel.Reserve(Describe(i), &payload))) return;
    for (std::uint64_t word = 0; word < kWords; ++word) reinterpret_cast<std::uint64_t*>(payload)[word] = i + word;
    channel.Publish();
  }
}

int Read(TcpChannel& channel, int messages) {
  int good = 0;
  for (int i = 0; i < messages; ++i) {
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

// An abort from a third thread while the reader waits.
void PassAndAbort() {
  const Ends ends = Join(2);
  std::thread thread([&] { Write(*ends.writer, 5000); });
  std::printf("%d messages\n", Read(*ends.reader, 5000));
  thread.join();
  std::thread aborting([&] { ends.writer->Abort(); });
  const char* payload = nullptr;
  std::printf("aborted: %d\n", ends.reader->Peek(Describe(0), &payload).code == lamina::Code::kAborted);
  aborting.join();
  ends.writer->Close();
  ends.reader->Close();
}

// Closing right behind the last message, while most are still to be read.
void PassAndClose() {
  const Ends ends = Join(1000);
  std::thread thread([&] {
    Write(*ends.writer, 2000);
    ends.writer->Close();
  });
  std::printf("closed after %d of 2000\n", Read(*ends.reader, 2000));
  thread.join();
  ends.reader->Close();
}

}  // namespace

int main() {
  PassAndAbort();
  PassAndClose();
}
