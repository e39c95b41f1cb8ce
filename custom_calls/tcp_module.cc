#include "tcp_module.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "handle.h"
#include "system.h"
#include "tcp_channel.h"
#include "tcp_frame.h"

namespace nb = nanobind;

namespace lamina {
namespace {

using TcpHandle = HandleOf<TcpChannel>;

std::unique_ptr<TcpHandle> Create(bool writer, std::string peer, std::uint32_t num_slots, std::uint64_t slot_bytes,
                                  double timeout_s, double spin_us, std::int32_t device) {
  EndOptions options{writer ? Role::kWriter : Role::kReader, std::move(peer), timeout_s, spin_us};
  return std::make_unique<TcpHandle>(TcpChannel::Create(std::move(options), num_slots, slot_bytes), device);
}

Token ToToken(const nb::bytes& token) {
  Token out;
  if (token.size() != out.size()) {
    throw std::invalid_argument("expected a token of " + std::to_string(out.size()) + " bytes, got " +
                                std::to_string(token.size()));
  }
  std::memcpy(out.data(), token.data(), out.size());
  return out;
}

void Accept(const TcpHandle& handle, int listener, const nb::bytes& token, std::uint32_t pid, std::string host) {
  UniqueFd owned(listener);
  handle.end()->Accept(std::move(owned), ToToken(token), {pid, std::move(host)});
}

void Connect(const TcpHandle& handle, int socket, std::uint32_t pid, std::string host) {
  UniqueFd owned(socket);
  handle.end()->Connect(std::move(owned), {pid, std::move(host)});
}

nb::bytes HelloOf(const nb::bytes& token) {
  Hello hello;
  hello.token = ToToken(token);
  return nb::bytes(&hello, sizeof(hello));
}

}  // namespace

void BindTcp(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> no_gil;
  nb::class_<TcpHandle, Handle>(module, "TcpHandle")
      .def_static("create", &Create, nb::arg("writer"), nb::arg("peer"), nb::arg("num_slots"), nb::arg("slot_bytes"),
                  nb::arg("timeout_s"), nb::arg("spin_us"), nb::arg("device") = kAnyDevice, no_gil)
      .def("accept", &Accept, nb::arg("listener"), nb::arg("token"), nb::arg("pid"), nb::arg("host"))
      .def("connect", &Connect, nb::arg("socket"), nb::arg("pid"), nb::arg("host"));
  module.def("tcp_hello", &HelloOf, nb::arg("token"));
  module.attr("TCP_WELCOME") = nb::bytes(&kWelcome, sizeof(kWelcome));
}

}  // namespace lamina
