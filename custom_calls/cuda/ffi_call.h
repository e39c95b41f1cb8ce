// From the operands of a custom call to the parameters of a kernel, for the ends of every family.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "call.h"
#include "xla/ffi/api/ffi.h"

namespace lamina::cuda {

namespace ffi = xla::ffi;

using Stamp = ffi::BufferR1<ffi::S32>;  // [step, layer, batch]
using ChannelIds = ffi::Span<const std::int64_t>;  // by batch

inline ffi::Error CudaError(cudaError_t error, const char* what) {
  return ffi::Error::Internal(std::string(what) + " failed: " + cudaGetErrorString(error));
}

inline ffi::AnyBuffer At(const ffi::RemainingArgs& tensors, std::size_t i) { return *tensors.get<ffi::AnyBuffer>(i); }
inline ffi::AnyBuffer At(const ffi::RemainingRets& tensors, std::size_t i) { return **tensors.get<ffi::AnyBuffer>(i); }

inline ffi::Error TooMany(const char* what, std::size_t got, int limit) {
  return ffi::Error::InvalidArgument(std::string("expected at most ") + std::to_string(limit) + " " + what +
                                     " in one send or recv on a GPU, got " + std::to_string(got));
}

template <typename End, typename Tensors>
ffi::Error Describe(const Stamp& stamp, ffi::Result<Stamp>& stamp_out, std::int32_t tag, const Tensors& tensors,
                    CallOf<End>& call) {
  if (tensors.size() > kMaxTensors) return TooMany("tensors", tensors.size(), kMaxTensors);
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

inline ffi::Error Launched(cudaError_t error, const char* what) {
  return error == cudaSuccess ? ffi::Error::Success() : CudaError(error, what);
}

}  // namespace lamina::cuda
