#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "gda_end.h"
#include "gda_ffi_handlers.h"
#include "gda_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace lamina::cuda::gda {
namespace {

namespace ffi = xla::ffi;

using Stamp = ffi::BufferR1<ffi::S32>;  // [step, layer, batch]
using ChannelIds = ffi::Span<const std::int64_t>;  // by batch

ffi::AnyBuffer At(const ffi::RemainingArgs& tensors, std::size_t i) { return *tensors.get<ffi::AnyBuffer>(i); }
ffi::AnyBuffer At(const ffi::RemainingRets& tensors, std::size_t i) { return **tensors.get<ffi::AnyBuffer>(i); }

ffi::Error Refuse(const std::string& why) { return ffi::Error(ffi::ErrorCode::kFailedPrecondition, why); }

// The ends of this GPU, by batch. A failure that a kernel left on record comes out here, at the next launch.
ffi::Error TakeEnds(ChannelIds channels, std::int32_t device, Role role, Call& call) {
  for (const std::int64_t id : channels) {
    const std::shared_ptr<GpuEnd> end = FindEnd(id);
    if (end == nullptr) return Refuse("gda channel " + std::to_string(id) + " is closed on this side");
    if (end->device() != device) continue;
    if (call.num_ends == kMaxBatches) return Refuse("expected at most 32 channels, got more");
    if (end->role() != role) return Refuse("gda channel " + std::to_string(id) + " is used at its other end");
    if (!end->connected()) return Refuse("gda channel " + std::to_string(id) + " is not connected; call connect first");
    if (std::string failure = end->failure(); !failure.empty()) return Refuse(failure);
    call.ends[call.num_ends] = end->end();
    call.ids[call.num_ends++] = static_cast<std::uint64_t>(id);
  }
  if (call.num_ends > 0) return ffi::Error::Success();
  return Refuse("the program runs on GPU " + std::to_string(device) + " and none of its gda channels has an end there");
}

template <typename Tensors>
ffi::Error Describe(const Stamp& stamp, ffi::Result<Stamp>& stamp_out, std::int32_t tag, const Tensors& tensors,
                    Call& call) {
  if (tensors.size() > kMaxTensors) {
    return Refuse("expected at most 32 tensors in one message, got " + std::to_string(tensors.size()));
  }
  call.stamp = stamp.typed_data();
  call.stamp_out = stamp_out->typed_data();
  call.tag = tag;
  call.num_tensors = static_cast<std::uint32_t>(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ffi::AnyBuffer tensor = At(tensors, i);
    const std::uint64_t bytes = tensor.size_bytes();
    call.tensors[i] = {static_cast<char*>(tensor.untyped_data()), bytes};
    call.payload_bytes += AlignToLine(bytes);
    call.layout = LayoutOf(call.layout, static_cast<std::uint64_t>(tensor.element_type()), bytes);
  }
  return ffi::Error::Success();
}

ffi::Error Launched(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("the launch of a ") + what + " failed: " + cudaGetErrorString(error));
}

ffi::Error Send(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::RemainingArgs tensors, ffi::Result<Stamp> stamp_out) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kWriter, call); error.failure()) return error;
  return Launched(LaunchSend(call, stream), "gda send");
}

ffi::Error Recv(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::Result<Stamp> stamp_out, ffi::RemainingRets tensors) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kReader, call); error.failure()) return error;
  return Launched(LaunchRecv(call, stream), "gda recv");
}

}  // namespace
}  // namespace lamina::cuda::gda

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaGdaSend, lamina::cuda::gda::Send,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::gda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::gda::Stamp>()
                                  .RemainingArgs()
                                  .Ret<lamina::cuda::gda::Stamp>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaGdaRecv, lamina::cuda::gda::Recv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::gda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::gda::Stamp>()
                                  .Ret<lamina::cuda::gda::Stamp>()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
