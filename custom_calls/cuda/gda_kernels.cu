#include "gda_kernels.h"

#include <algorithm>
#include <cstdint>

#include "gda_channel.h"

namespace lamina::cuda::gda {
namespace {

constexpr unsigned kThreads = 256;
// What a block copies with four rounds of its threads. A message up to this size is the business of one block.
constexpr std::uint64_t kBytesPerBlock = kThreads * 4 * sizeof(Vec16);
// Enough to copy faster than a NIC sends; more would only take room from other kernels while they wait.
constexpr std::uint64_t kMaxBlocks = 32;

struct Block {
  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ std::uint32_t blocks() const { return gridDim.x; }
  __device__ std::uint64_t index() const { return std::uint64_t{blockIdx.x} * kThreads + threadIdx.x; }
  __device__ std::uint64_t count() const { return std::uint64_t{gridDim.x} * kThreads; }
  __device__ void Sync() const { __syncthreads(); }
  __device__ bool Any(bool mine) const { return __syncthreads_or(mine) != 0; }
};

__global__ void __launch_bounds__(kThreads, 1) SendKernel(const __grid_constant__ Call call) { Send(call, Block{}); }
__global__ void __launch_bounds__(kThreads, 1) RecvKernel(const __grid_constant__ Call call) { Recv(call, Block{}); }
__global__ void TellPeerKernel(const End* end, std::uint64_t stop) { TellPeer(*end, stop); }

unsigned BlocksFor(std::uint64_t bytes) {
  return static_cast<unsigned>(
      std::clamp<std::uint64_t>((bytes + kBytesPerBlock - 1) / kBytesPerBlock, 1, kMaxBlocks));
}

}  // namespace

cudaError_t LaunchSend(const Call& call, cudaStream_t stream) {
  SendKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchRecv(const Call& call, cudaStream_t stream) {
  RecvKernel<<<BlocksFor(call.payload_bytes), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LaunchTellPeer(const End* end, std::uint64_t stop, cudaStream_t stream) {
  TellPeerKernel<<<1, 1, 0, stream>>>(end, stop);
  return cudaGetLastError();
}

}  // namespace lamina::cuda::gda
