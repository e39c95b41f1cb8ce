#include "kernels.h"

#include "grid.h"
#include "operations.h"
#include "transport.h"

namespace lamina::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) SendKernel(const __grid_constant__ Call call) { Send(call, Block{}); }
__global__ void __launch_bounds__(kThreads) RecvKernel(const __grid_constant__ Call call) { Recv(call, Block{}); }
__global__ void NothingKernel() {}

}  // namespace

cudaError_t LoadKernels() {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, SendKernel); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, RecvKernel); error != cudaSuccess) return error;
  return cudaFuncGetAttributes(&attributes, NothingKernel);
}

cudaError_t LaunchSend(const Call& call, cudaStream_t stream) {
  SendKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchRecv(const Call& call, cudaStream_t stream) {
  RecvKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchNothing(cudaStream_t stream) {
  NothingKernel<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace lamina::cuda
