#include "tcp_accept.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <optional>
#include <vector>

namespace lamina {
namespace {

using Clock = std::chrono::steady_clock;

// How long someone may take to present the token.
constexpr std::chrono::seconds kHelloTime{2};
// How many may be about to present one. One more, and the first of them is dropped.
constexpr std::size_t kMostStrangers = 8;

struct Stranger {
  UniqueFd socket;
  Clock::time_point deadline;
  Hello hello{};
  std::size_t received = 0;
};

enum class Verdict { kWait, kDrop, kTake };

// Takes equally long wherever the difference is.
bool SameToken(const Token& a, const Token& b) {
  unsigned char difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == 0;
}

Verdict Listen(Stranger& stranger, const Token& token) {
  while (stranger.received < sizeof(Hello)) {
    char* const rest = reinterpret_cast<char*>(&stranger.hello) + stranger.received;
    const ssize_t got = recv(stranger.socket.get(), rest, sizeof(Hello) - stranger.received, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return Clock::now() < stranger.deadline ? Verdict::kWait : Verdict::kDrop;
    if (got <= 0) return Verdict::kDrop;
    stranger.received += static_cast<std::size_t>(got);
  }
  if (stranger.hello.magic != kHelloMagic || !SameToken(stranger.hello.token, token)) return Verdict::kDrop;
  const std::uint64_t welcome = kWelcome;
  const ssize_t sent = send(stranger.socket.get(), &welcome, sizeof(welcome), MSG_DONTWAIT | MSG_NOSIGNAL);
  return sent == sizeof(welcome) ? Verdict::kTake : Verdict::kDrop;
}

bool GoneAgain(int error) { return error == EAGAIN || error == EINTR || error == ECONNABORTED || error == EPROTO; }

void TakeIn(int listener, std::vector<Stranger>& strangers) {
  UniqueFd socket(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.open()) {
    if (GoneAgain(errno)) return;
    ThrowErrno(errno, "cannot accept its connection");
  }
  if (strangers.size() == kMostStrangers) strangers.erase(strangers.begin());
  strangers.push_back({std::move(socket), Clock::now() + kHelloTime});
}

void AwaitNews(int listener, int wake, const std::vector<Stranger>& strangers) {
  std::vector<pollfd> polled{{wake, POLLIN, 0}, {listener, POLLIN, 0}};
  for (const Stranger& stranger : strangers) polled.push_back({stranger.socket.get(), POLLIN, 0});
  int limit_ms = -1;
  if (!strangers.empty()) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(strangers.front().deadline - Clock::now());
    limit_ms = static_cast<int>(std::max(left, left.zero()).count());
  }
  poll(polled.data(), polled.size(), limit_ms);
}

}  // namespace

UniqueFd AcceptPeer(int listener, int wake, const Token& token, const std::function<bool()>& stopped) {
  fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK);
  std::vector<Stranger> strangers;  // the first has come first
  while (!stopped()) {
    AwaitNews(listener, wake, strangers);
    TakeIn(listener, strangers);
    for (auto stranger = strangers.begin(); stranger != strangers.end();) {
      const Verdict verdict = Listen(*stranger, token);
      if (verdict == Verdict::kTake) return std::move(stranger->socket);
      stranger = verdict == Verdict::kWait ? stranger + 1 : strangers.erase(stranger);
    }
  }
  return UniqueFd();
}

}  // namespace lamina
