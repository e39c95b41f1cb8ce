#include "gda_kernels.h"

#include <cstdint>

#include "gda_channel.h"
#include "grid.h"
#include "operations.h"

namespace lamina::cuda::gda {
namespace {

__global__ void __launch_bounds__(kThreads, 1) SendKernel(const __grid_constant__ Call call) { Send(call, Block{}); }
__global__ void __launch_bounds__(kThreads, 1) RecvKernel(const __grid_constant__ Call call) { Recv(call, Block{}); }
__global__ void StopKernel(End* end, std::uint64_t stop) { StopEnd(*end, stop); }

}  // namespace

cudaError_t LaunchSend(const Call& call, cudaStream_t stream) {
  SendKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchRecv(const Call& call, cudaStream_t stream) {
  RecvKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchStop(End* end, std::uint64_t stop, cudaStream_t stream) {
  StopKernel<<<1, 1, 0, stream>>>(end, stop);
  return cudaGetLastError();
}

}  // namespace lamina::cuda::gda
