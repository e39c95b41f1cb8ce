#include "ffi_handlers.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "channel_end.h"
#include "ffi_error.h"
#include "registry.h"
#include "timeline.h"
#include "xla/ffi/api/ffi.h"

namespace lamina {
namespace {

namespace ffi = xla::ffi;

using Stamp = ffi::BufferR1<ffi::S32>;  // [step, layer, batch]
using ChannelIds = ffi::Span<const std::int64_t>;  // by device, then by batch

// The channel of the message's batch among those that this device uses. A program may run on several devices; it then
// names the channels of all of them. A number that is not there was closed.
ffi::Error Choose(ChannelIds channels, std::int32_t device, Role role, const Message& message,
                  std::shared_ptr<ChannelEnd>* channel, std::int64_t* id) {
  std::int32_t batches = 0;
  for (const std::int64_t candidate : channels) {
    Registered found = FindChannel(candidate);
    if (found.device != kAnyDevice && found.device != device) continue;
    if (batches++ != message.batch) continue;
    *channel = std::move(found.channel);
    *id = candidate;
    if (*channel != nullptr) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kAborted, OperationName(role, message) + " failed: " + kSelfClosed);
  }
  return ffi::Error(ffi::ErrorCode::kOutOfRange, NoChannel(role, message, batches));
}

ffi::AnyBuffer At(const ffi::RemainingArgs& tensors, std::size_t i) { return *tensors.get<ffi::AnyBuffer>(i); }
ffi::AnyBuffer At(const ffi::RemainingRets& tensors, std::size_t i) { return **tensors.get<ffi::AnyBuffer>(i); }

template <typename Tensors>
Message Describe(std::int32_t tag, const Stamp& stamp, const Tensors& tensors) {
  Message message;
  message.tag = tag;
  message.step = stamp.typed_data()[0];
  message.layer = stamp.typed_data()[1];
  message.batch = stamp.typed_data()[2];
  message.num_tensors = static_cast<std::uint32_t>(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ffi::AnyBuffer tensor = At(tensors, i);
    const std::uint64_t bytes = tensor.size_bytes();
    message.payload_bytes += AlignToLine(bytes);
    message.layout = LayoutOf(message.layout, static_cast<std::uint64_t>(tensor.element_type()), bytes);
  }
  return message;
}

// An empty tensor may have no address, which memcpy would not allow.
void Copy(void* to, const void* from, std::size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

void CopyStamp(const Stamp& from, ffi::Result<Stamp>& to) {
  std::memcpy(to->typed_data(), from.typed_data(), from.size_bytes());
}

ffi::Error Send(std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp, ffi::RemainingArgs tensors,
                ffi::Result<Stamp> stamp_out) {
  CallTimer timer;
  const Message message = Describe(tag, stamp, tensors);
  std::shared_ptr<ChannelEnd> channel;
  std::int64_t id = 0;
  if (ffi::Error error = Choose(channels, device, Role::kWriter, message, &channel, &id); error.failure()) return error;
  char* payload = nullptr;
  if (Status status = channel->Reserve(message, &payload); !status.ok()) return ToError(std::move(status));
  timer.Ready();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ffi::AnyBuffer tensor = At(tensors, i);
    Copy(payload, tensor.untyped_data(), tensor.size_bytes());
    payload += AlignToLine(tensor.size_bytes());
  }
  if (Status status = channel->Publish(); !status.ok()) return ToError(std::move(status));
  timer.End(Role::kWriter, id, message);
  CopyStamp(stamp, stamp_out);
  return ffi::Error::Success();
}

ffi::Error Recv(std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp, ffi::Result<Stamp> stamp_out,
                ffi::RemainingRets tensors) {
  CallTimer timer;
  const Message expected = Describe(tag, stamp, tensors);
  std::shared_ptr<ChannelEnd> channel;
  std::int64_t id = 0;
  if (ffi::Error error = Choose(channels, device, Role::kReader, expected, &channel, &id); error.failure()) return error;
  const char* payload = nullptr;
  if (Status status = channel->Peek(expected, &payload); !status.ok()) return ToError(std::move(status));
  timer.Ready();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ffi::AnyBuffer tensor = At(tensors, i);
    Copy(tensor.untyped_data(), payload, tensor.size_bytes());
    payload += AlignToLine(tensor.size_bytes());
  }
  if (Status status = channel->Release(); !status.ok()) return ToError(std::move(status));
  timer.End(Role::kReader, id, expected);
  CopyStamp(stamp, stamp_out);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lamina

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaSend, lamina::Send,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::Stamp>()
                                  .RemainingArgs()
                                  .Ret<lamina::Stamp>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaRecv, lamina::Recv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::Stamp>()
                                  .Ret<lamina::Stamp>()
                                  .RemainingRets());
