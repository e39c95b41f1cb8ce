// A send and a recv as a grid of blocks runs them.
//
// Each block waits on its own and copies its share; the last to finish hands the slot over. No block waits for another,
// so a grid needs no room on the device for all its blocks at once.
//
// `Group` is one block: leader() for one thread of it, blocks() of the grid, index() among the threads of the grid,
// count() of these, Sync() as __syncthreads, and Any(x), which is true in all threads of the block if x was in one.
// kernels.cu has the GPU's; a test runs a thread for each block.
#pragma once

#include <cstdint>

#include "transport.h"

namespace lamina::cuda {

// The end for the message's batch; null if there is none.
LAMINA_DEVICE End* Choose(const Call& call, const Message& message) {
  const auto batch = static_cast<std::uint32_t>(message.batch);  // a negative one becomes too large
  return batch < call.num_ends ? call.ends[batch] : nullptr;
}

// Whether the end may be used: it is not if it is closed or has failed. Without an end the first one has to report it.
LAMINA_DEVICE bool Open(const Call& call, const End* end, const Message& message) {
  if (end != nullptr) {
    return LoadRelaxedSystem(&end->id) == call.ids[message.batch] && LoadRelaxedSystem(&end->failed) == 0;
  }
  FailureRecord details{};
  details.expected = message;
  details.got.batch = static_cast<std::int32_t>(call.num_ends);
  return LoadRelaxedSystem(&call.ends[0]->id) == call.ids[0] && Fail(*call.ends[0], Reason::kNoChannel, details);
}

// True in the thread that is to hand the slot over: every block has done its share, and nothing has failed.
LAMINA_DEVICE bool Last(End& end, std::uint32_t blocks) {
  FenceSystem();
  if (AtomicAddDevice(&end.arrived, 1u) != blocks - 1) return false;
  StoreRelaxedSystem(&end.arrived, 0u);
  return LoadRelaxedSystem(&end.failed) == 0;
}

template <typename Group>
LAMINA_DEVICE void CopyStamp(const Call& call, Group group) {
  for (std::uint64_t i = group.index(); i < 3; i += group.count()) call.stamp_out[i] = call.stamp[i];
}

// `stop` was loaded when the operation began: on a GPU it arrives while the operation goes on.
LAMINA_DEVICE bool MayFinish(End& end, const Message& message, std::uint32_t stop) {
  const Stop now = StopOf(end.role, stop);
  return !now.final || Fail(end, now.reason, message);
}

template <typename Group>
LAMINA_DEVICE void Send(const Call& call, Group group) {
  CopyStamp(call, group);
  const Message message = Describe(call);
  End* const end = Choose(call, message);
  if (!group.Any(group.leader() && Open(call, end, message))) return;
  const Turn turn = TurnOf(*end);
  std::uint32_t stop = 0;
  std::uint64_t seen = 0;
  bool ready = false;
  if (group.leader()) {
    stop = LoadRelaxedSystem(Word(end->ring->stop));
    ready = AwaitRoom(*end, message, turn, &seen);
  }
  if (group.Any(ready)) {
    char* to = turn.payload();
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare<false>(to, call.tensors[i].data, call.tensors[i].bytes, group.index(), group.count());
      to += AlignToLine(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  if (ready) ready = MayFinish(*end, message, stop);
  if (Last(*end, group.blocks()) && ready) Publish(*end, message, turn, seen);
}

template <typename Group>
LAMINA_DEVICE void Recv(const Call& call, Group group) {
  CopyStamp(call, group);
  const Message expected = Describe(call);
  End* const end = Choose(call, expected);
  if (!group.Any(group.leader() && Open(call, end, expected))) return;
  const Turn turn = TurnOf(*end);
  std::uint32_t stop = 0;
  bool ready = false;
  if (group.leader()) {
    stop = LoadRelaxedSystem(Word(end->ring->stop));
    ready = AwaitMessage(*end, expected, turn);
  }
  if (group.Any(ready)) {
    const char* from = turn.payload();
    for (std::uint32_t i = 0; i < call.num_tensors; ++i) {
      CopyShare<true>(call.tensors[i].data, from, call.tensors[i].bytes, group.index(), group.count());
      from += AlignToLine(call.tensors[i].bytes);
    }
  }
  group.Sync();
  if (!group.leader()) return;
  if (ready) ready = MayFinish(*end, expected, stop);
  if (Last(*end, group.blocks()) && ready) Release(*end, turn);
}

}  // namespace lamina::cuda
