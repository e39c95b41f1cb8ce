// The grids of blocks that run a send or a recv; for nvcc only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ptx.h"

namespace lamina::cuda {

inline constexpr unsigned kThreads = 256;
// What a block copies with four loads per thread. A message up to this size is the business of one block.
inline constexpr std::uint64_t kBytesPerBlock = kThreads * 4 * sizeof(Vec16);
// Enough to keep PCIe, NVLink or a NIC busy; more would only take room from other kernels while they wait.
inline constexpr std::uint64_t kMaxBlocks = 32;

struct Block {
  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ std::uint32_t blocks() const { return gridDim.x; }
  __device__ std::uint64_t index() const { return std::uint64_t{blockIdx.x} * kThreads + threadIdx.x; }
  __device__ std::uint64_t count() const { return std::uint64_t{gridDim.x} * kThreads; }
  __device__ void Sync() const { __syncthreads(); }
  __device__ bool Any(bool mine) const { return __syncthreads_or(mine) != 0; }
};

inline unsigned BlocksFor(std::uint64_t bytes) {
  return static_cast<unsigned>(
      std::clamp<std::uint64_t>((bytes + kBytesPerBlock - 1) / kBytesPerBlock, 1, kMaxBlocks));
}

}  // namespace lamina::cuda
