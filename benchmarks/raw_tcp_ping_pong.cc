// The floor for channel_latency.py --kind=tcp: two processes pass messages through a connection and do nothing but write
// the payload and read it, waiting in the kernel.
//
// usage: raw_tcp_ping_pong PAYLOAD_BYTES NUM_SLOTS(unused) ROUNDS CORE CORE      prints nanoseconds per round trip
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void Require(bool good, const char* what) {
  if (good) return;
  std::perror(what);
  std::exit(1);
}

void Send(int socket, const std::vector<char>& payload) {
  for (std::size_t sent = 0; sent < payload.size();) {
    const ssize_t bytes = write(socket, payload.data() + sent, payload.size() - sent);
    Require(bytes > 0, "write");
    sent += static_cast<std::size_t>(bytes);
  }
}

void Recv(int socket, std::vector<char>& payload) {
  Require(recv(socket, payload.data(), payload.size(), MSG_WAITALL) == static_cast<ssize_t>(payload.size()), "recv");
}

void SendAtOnce(int socket) {
  const int on = 1;
  Require(setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0, "TCP_NODELAY");
}

void PinTo(const char* core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(std::atoi(core), &cores);
  Require(sched_setaffinity(0, sizeof(cores), &cores) == 0, "sched_setaffinity");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  std::vector<char> payload(std::strtoull(argv[1], nullptr, 10), 1);
  const std::uint64_t rounds = std::strtoull(argv[3], nullptr, 10);
  const std::uint64_t warm_up = rounds / 10 + 10;

  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof(at);
  auto* const address = reinterpret_cast<sockaddr*>(&at);
  Require(bind(listener, address, bytes) == 0 && listen(listener, 1) == 0, "listen");
  Require(getsockname(listener, address, &bytes) == 0, "getsockname");

  const pid_t child = fork();
  PinTo(argv[child == 0 ? 5 : 4]);
  if (child == 0) {
    const int connection = socket(AF_INET, SOCK_STREAM, 0);
    Require(connect(connection, address, bytes) == 0, "connect");
    SendAtOnce(connection);
    for (std::uint64_t i = 0; i < warm_up + rounds; ++i) {
      Recv(connection, payload);
      Send(connection, payload);
    }
    _exit(0);
  }
  const int connection = accept(listener, nullptr, nullptr);
  SendAtOnce(connection);
  auto start = std::chrono::steady_clock::now();
  for (std::uint64_t i = 0; i < warm_up + rounds; ++i) {
    if (i == warm_up) start = std::chrono::steady_clock::now();
    Send(connection, payload);
    Recv(connection, payload);
  }
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  waitpid(child, nullptr, 0);
  std::printf("%.1f\n", spent.count() / static_cast<double>(rounds));
}
