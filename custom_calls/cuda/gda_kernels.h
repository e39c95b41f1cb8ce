// The kernels of gda channels, launched from plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include "gda_layout.h"

namespace lamina::cuda::gda {

// Brings the kernels into the memory of the GPU in use.
cudaError_t LoadKernels();
// Each enqueues one kernel and returns what the launch returned.
cudaError_t LaunchSend(const Call& call, cudaStream_t stream);
cudaError_t LaunchRecv(const Call& call, cudaStream_t stream);
// AbortEnd and CloseEnd of gda_channel.h. `end` is in device memory.
cudaError_t LaunchAbort(End* end, cudaStream_t stream);
cudaError_t LaunchClose(End* end, cudaStream_t stream);

}  // namespace lamina::cuda::gda
