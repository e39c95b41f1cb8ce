#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "ffi_call.h"
#include "gda_end.h"
#include "gda_ffi_handlers.h"
#include "gda_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace lamina::cuda::gda {
namespace {

ffi::Error Refuse(const std::string& why) { return ffi::Error(ffi::ErrorCode::kFailedPrecondition, why); }

// The ends of this GPU, by batch. A failure that a kernel left on record comes out here, at the next launch.
ffi::Error TakeEnds(ChannelIds channels, std::int32_t device, Role role, Call& call) {
  for (const std::int64_t id : channels) {
    const std::shared_ptr<GpuEnd> end = FindEnd(id);
    if (end == nullptr) return Refuse("gda channel " + std::to_string(id) + " is closed on this side");
    if (end->device() != device) continue;
    if (call.num_ends == kMaxBatches) return TooMany("channels", channels.size(), kMaxBatches);
    if (end->role() != role) return Refuse("gda channel " + std::to_string(id) + " is used at its other end");
    if (!end->connected()) return Refuse("gda channel " + std::to_string(id) + " is not connected; call connect first");
    if (std::string failure = end->failure(); !failure.empty()) return Refuse(failure);
    call.ends[call.num_ends] = end->end();
    call.ids[call.num_ends++] = static_cast<std::uint64_t>(id);
  }
  if (call.num_ends > 0) return ffi::Error::Success();
  return Refuse("the program runs on GPU " + std::to_string(device) + " and none of its gda channels has an end there");
}

ffi::Error Send(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::RemainingArgs tensors, ffi::Result<Stamp> stamp_out) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kWriter, call); error.failure()) return error;
  return Launched(LaunchSend(call, stream), "the launch of a gda send");
}

ffi::Error Recv(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::Result<Stamp> stamp_out, ffi::RemainingRets tensors) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kReader, call); error.failure()) return error;
  return Launched(LaunchRecv(call, stream), "the launch of a gda recv");
}

}  // namespace
}  // namespace lamina::cuda::gda

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaGdaSend, lamina::cuda::gda::Send,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::Stamp>()
                                  .RemainingArgs()
                                  .Ret<lamina::cuda::Stamp>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaGdaRecv, lamina::cuda::gda::Recv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::Stamp>()
                                  .Ret<lamina::cuda::Stamp>()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
