#include "cuda/ffi_handlers.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/device_end.h"
#include "cuda/ffi_call.h"
#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "ffi_error.h"
#include "xla/ffi/api/ffi.h"

namespace lamina::cuda {
namespace {

std::atomic<std::uint64_t> launches{0};

// Adds the ends that are this GPU's to `call`.
ffi::Error TakeEnds(ChannelIds channels, std::int32_t device, Role role, Call& call) {
  for (const std::int64_t id : channels) {
    const std::shared_ptr<DeviceEnd> end = FindEnd(id);
    if (end == nullptr) {
      return ffi::Error(ffi::ErrorCode::kAborted,
                        OperationName(role, call.tag) + " failed: " + kSelfClosed);
    }
    if (end->device() != device) continue;
    if (call.num_ends == kMaxBatches) return TooMany("channels", channels.size(), kMaxBatches);
    if (Status status = end->Ready(call.tag); !status.ok()) return ToError(std::move(status));
    call.ends[call.num_ends] = end->end();
    call.ids[call.num_ends++] = end->id();
  }
  if (call.num_ends > 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                    OperationName(role, call.tag) + " failed: the program runs on GPU " + std::to_string(device) +
                        " and none of its channels has an end there; make them with device=" + std::to_string(device));
}

ffi::Error Send(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::RemainingArgs tensors, ffi::Result<Stamp> stamp_out) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kWriter, call); error.failure()) return error;
  launches.fetch_add(1, std::memory_order_relaxed);
  return Launched(LaunchSend(call, stream), "the launch of a send");
}

ffi::Error Recv(cudaStream_t stream, std::int32_t device, ChannelIds channels, std::int32_t tag, Stamp stamp,
                ffi::Result<Stamp> stamp_out, ffi::RemainingRets tensors) {
  Call call{};
  if (ffi::Error error = Describe(stamp, stamp_out, tag, tensors, call); error.failure()) return error;
  if (ffi::Error error = TakeEnds(channels, device, Role::kReader, call); error.failure()) return error;
  launches.fetch_add(1, std::memory_order_relaxed);
  return Launched(LaunchRecv(call, stream), "the launch of a recv");
}

bool Capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusActive;
}

// Does nothing but depend on all its operands; results share their memory where XLA lets them.
ffi::Error Fence(cudaStream_t stream, ffi::RemainingArgs values, ffi::RemainingRets same) {
  bool copied = false;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const ffi::AnyBuffer from = At(values, i), to = At(same, i);
    if (from.untyped_data() == to.untyped_data() || from.size_bytes() == 0) continue;
    const cudaError_t error = cudaMemcpyAsync(to.untyped_data(), from.untyped_data(), from.size_bytes(),
                                              cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return CudaError(error, "the copy of a fence");
    copied = true;
  }
  // Some versions of XLA refuse a call that puts nothing into the graph being captured.
  if (!copied && Capturing(stream)) return Launched(LaunchNothing(stream), "the launch of a fence");
  return ffi::Error::Success();
}

}  // namespace

std::uint64_t LaunchCount() { return launches.load(std::memory_order_relaxed); }

}  // namespace lamina::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaCudaSend, lamina::cuda::Send,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::Stamp>()
                                  .RemainingArgs()
                                  .Ret<lamina::cuda::Stamp>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaCudaRecv, lamina::cuda::Recv,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Attr<lamina::cuda::ChannelIds>("channels")
                                  .Attr<std::int32_t>("tag")
                                  .Arg<lamina::cuda::Stamp>()
                                  .Ret<lamina::cuda::Stamp>()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaCudaFence, lamina::cuda::Fence,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
