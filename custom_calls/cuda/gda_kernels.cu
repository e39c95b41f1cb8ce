#include "gda_kernels.h"

#include <cstdint>

#include "gda_channel.h"
#include "grid.h"
#include "operations.h"

namespace lamina::cuda::gda {
namespace {

__global__ void __launch_bounds__(kThreads, 1) SendKernel(const __grid_constant__ Call call) { Send(call, Block{}); }
__global__ void __launch_bounds__(kThreads, 1) RecvKernel(const __grid_constant__ Call call) { Recv(call, Block{}); }
__global__ void AbortKernel(End* end) { AbortEnd(*end); }
__global__ void CloseKernel(End* end) { CloseEnd(*end); }

}  // namespace

cudaError_t LoadKernels() {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, SendKernel); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, RecvKernel); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, AbortKernel); error != cudaSuccess) return error;
  return cudaFuncGetAttributes(&attributes, CloseKernel);
}

cudaError_t LaunchSend(const Call& call, cudaStream_t stream) {
  SendKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchRecv(const Call& call, cudaStream_t stream) {
  RecvKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchAbort(End* end, cudaStream_t stream) {
  AbortKernel<<<1, 1, 0, stream>>>(end);
  return cudaGetLastError();
}

cudaError_t LaunchClose(End* end, cudaStream_t stream) {
  CloseKernel<<<1, 1, 0, stream>>>(end);
  return cudaGetLastError();
}

}  // namespace lamina::cuda::gda
