// A send and a recv as a grid of blocks runs them, for the ends of every family (transport.h, gda_channel.h). Next to
// its End a family declares, besides what waiting.h asks for:
//   Turn TurnOf(const End&)                                the message that comes next
//   bool AwaitRoom(End&, const Message&, Turn&)            and AwaitMessage: wait and check; what fails goes on record
//   char* PayloadOf(const End&, const Turn&)               where tensors lie in the slot
//   StopWord(const End&), MayFinish(End&, message, word)   whether an operation may still succeed at its end
//   void Publish(End&, const Message&, const Turn&)        and Release: hand the slot over
//
// Each block waits on its own and copies its share; the last to finish hands the slot over. No block waits for another,
// so a grid needs no room on the device for all its blocks at once.
//
// `Group` is one block: leader() for one thread of it, blocks() of the grid, index() among the threads of the grid,
// count() of these, Sync() as __syncthreads, and Any(x), which is true in all threads of the block if x was in one.
// grid.h has the GPU's; a test runs a thread for each block.
#pragma once

#include <cstdint>

#include "waiting.h"

namespace lamina::cuda {

template <typename End>
LAMINA_DEVICE Message Describe(const CallOf<End>& call) {
  Message message;
  message.payload_bytes = call.payload_bytes;
  message.layout = call.layout;
  message.tag = call.tag;
  message.step = call.stamp[0];
  message.layer = call.stamp[1];
  message.batch = call.stamp[2];
  message.num_tensors = call.num_tensors;
  return message;
}

// The end for the message's batch; null if there is none. The same in all threads.
template <typename End>
LAMINA_DEVICE End* Choose(const CallOf<End>& call, const Message& message) {
  const auto batch = static_cast<std::uint32_t>(message.batch);  // a negative one becomes too large
  return batch < call.num_ends ? call.ends[batch] : nullptr;
}

// Whether the end may be used: it is not if it is closed or has failed. Without an end the first one has to report it.
// One thread per block asks: the answer changes when the end fails.
template <typename End>
LAMINA_DEVICE bool Open(const CallOf<End>& call, const End* end, const Message& message) {
  if (end != nullptr) {
    return LoadRelaxedSystem(&end->id) == call.ids[message.batch] && LoadRelaxedSystem(&end->failed) == 0;
  }
  FailureRecord details{};
  details.expected = message;
  details.got.batch = static_cast<std::int32_t>(call.num_ends);
  return LoadRelaxedSystem(&call.ends[0]->id) == call.ids[0] && Fail(*call.ends[0], Reason::kNoChannel, details);
}

// This thread's share of a copy. The slot's side is a multiple of 64; an XLA buffer is, but for views of others.
template <bool kFromSlot>
LAMINA_DEVICE void CopyShare(char* to, const char* from, std::uint64_t bytes, std::uint64_t index,
                             std::uint64_t count) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from);
  const std::uint64_t chunks = addresses % sizeof(Vec16) == 0 ? bytes / sizeof(Vec16) : 0;
  std::uint64_t i = index;
  // Four loads in flight per thread: what makes a copy over PCIe slow is waiting.
  for (; i + 3 * count < chunks; i += 4 * count) {
    Vec16 part[4];
    for (int k = 0; k < 4; ++k) {
      const char* const at = from + (i + k * count) * sizeof(Vec16);
      part[k] = kFromSlot ? Load16Once(at) : Load16(at);
    }
    for (int k = 0; k < 4; ++k) Store16(to + (i + k * count) * sizeof(Vec16), part[k]);
  }
  for (; i < chunks; i += count) {
    const char* const at = from + i * sizeof(Vec16);
    Store16(to + i * sizeof(Vec16), kFromSlot ? Load16Once(at) : Load16(at));
  }
  for (std::uint64_t byte = chunks * sizeof(Vec16) + index; byte < bytes; byte += count) to[byte] = from[byte];
}

// True in the thread that is to hand the slot over: every block has done its share, and nothing has failed.
template <typename End>
LAMINA_DEVICE bool Last(End& end, std::uint32_t blocks) {
  FenceSystem();
  if (AtomicAddDevice(&end.arrived, 1u) != blocks - 1) return false;
  StoreRelaxedSystem(&end.arrived, 0u);
  return LoadRelaxedSystem(&end.failed) == 0;
}

template <typename End, typename Group>
LAMINA_DEVICE void CopyStamp(const CallOf<End>& call, Group group) {
  for (std::uint64_t i = group.index(); i < 3; i += group.count()) call.stamp_out[i] = call.stamp[i];
}

template <typename End, typename Group>
LAMINA_DEVICE void Send(const CallOf<End>& call, Group group) {
  CopyStamp(call, group);
  const Message message = Describe(call);
  End* const end = Choose(call, message);
  if (!group.Any(group.leader() && Open(call, end, message))) return;
  auto turn = TurnOf(*end);
  decltype(StopWord(*end)) stop = 0;  // loaded now: on a GPU it arrives while the operation goes on
  bool ready = false;
  if (group.leader()) {
    stop = StopWord(*end);
    ready = AwaitRoom(*end, message, turn);
  }
  if (group.Any(ready)) {
    char* to = PayloadOf(*end, turn);
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare<false>(to, call.tensors[i].data, call.tensors[i].bytes, group.index(), group.count());
      to += AlignToLine(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  if (ready) ready = MayFinish(*end, message, stop);
  if (Last(*end, group.blocks()) && ready) Publish(*end, message, turn);
}

template <typename End, typename Group>
LAMINA_DEVICE void Recv(const CallOf<End>& call, Group group) {
  CopyStamp(call, group);
  const Message expected = Describe(call);
  End* const end = Choose(call, expected);
  if (!group.Any(group.leader() && Open(call, end, expected))) return;
  const auto turn = TurnOf(*end);
  decltype(StopWord(*end)) stop = 0;
  bool ready = false;
  if (group.leader()) {
    stop = StopWord(*end);
    ready = AwaitMessage(*end, expected, turn);
  }
  if (group.Any(ready)) {
    const char* from = PayloadOf(*end, turn);
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare<true>(call.tensors[i].data, from, call.tensors[i].bytes, group.index(), group.count());
      from += AlignToLine(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  if (ready) ready = MayFinish(*end, expected, stop);
  if (Last(*end, group.blocks()) && ready) Release(*end, expected, turn);
}

}  // namespace lamina::cuda
