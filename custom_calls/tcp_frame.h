// What the two ends of a channel through a TCP connection say to each other.
//
//   who connects:  [Hello]                                  who accepts:  [kWelcome], or it hangs up
//   the writer:    [Frame message] [payload] ...  and last  [Frame closed] or [Frame aborted]
//   the reader:    [Frame credit] ...             and last  [Frame closed] or [Frame aborted]
//
// A writer sends no more than num_slots messages that the reader has not given back, so the reader always has a slot for
// what comes and never leaves anything in the socket. Hosts are little-endian.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "message.h"

namespace lamina {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the two hosts of a connection must agree on the byte order");

inline constexpr std::uint64_t kHelloMagic = 0x3130504354414d4c;    // "LMATCP01"
inline constexpr std::uint64_t kWelcome = 0x3130454d434c4557;       // "WELCME01"
inline constexpr std::uint32_t kFrameMagic = 0x464d414c;            // "LAMF"

using Token = std::array<unsigned char, 32>;

struct Hello {
  std::uint64_t magic = kHelloMagic;
  Token token{};
};

enum class FrameType : std::uint32_t { kMessage = 1, kCredit = 2, kClosed = 3, kAborted = 4 };

struct Frame {
  std::uint32_t magic = kFrameMagic;
  FrameType type{};
  // A message: its number, from 0. Else how many messages its sender has sent, or given back, so far.
  std::uint64_t count = 0;
  Message message;  // of a message only
};

static_assert(sizeof(Hello) == 40 && sizeof(Frame) == 56 && offsetof(Frame, message) == 16);

}  // namespace lamina
