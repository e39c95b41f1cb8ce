// The kernels of gda channels, launched from plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include "gda_layout.h"

namespace lamina::cuda::gda {

// Each enqueues one kernel and returns what the launch returned.
cudaError_t LaunchSend(const Call& call, cudaStream_t stream);
cudaError_t LaunchRecv(const Call& call, cudaStream_t stream);
// Tells the peer that this side has stopped (kStopClosed or kStopAborted). `end` is in device memory.
cudaError_t LaunchStop(End* end, std::uint64_t stop, cudaStream_t stream);

}  // namespace lamina::cuda::gda
