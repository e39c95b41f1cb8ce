// The kernels, launched from plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include "layout.h"

namespace lamina::cuda {

// Brings the kernels into the memory of the GPU in use.
cudaError_t LoadKernels();
// Each enqueues one kernel and returns what the launch returned.
cudaError_t LaunchSend(const Call& call, cudaStream_t stream);
cudaError_t LaunchRecv(const Call& call, cudaStream_t stream);
// A kernel that does nothing, for a graph that needs a node.
cudaError_t LaunchNothing(cudaStream_t stream);

}  // namespace lamina::cuda
