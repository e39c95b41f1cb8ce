// The XLA custom calls on CUDA devices: see lamina_jax/transport/ops.py for their operands and results, which are those
// of the CPU's.
//
// Names, for platform="CUDA" (lamina_jax/transport/cuda.py registers them):
//   lamina_cuda_send, lamina_cuda_recv   of their own, since on the CPU each kind of channel has names of its own, too;
//                                        both kinds of CUDA channel share them
//   lamina_fence                         the name that the CPU's has: a program is lowered for either
// All are compatible with command buffers. None looks at channels before it runs, so that programs compile ahead of
// time, without a GPU and with any numbers for channels.
//
// attributes of send and recv: channels int64[], tag int32. A program that runs on several GPUs names the ends of all;
// each GPU takes those that are its own, by batch.
//
// What the CPU's handlers return as an error is known here only once the kernel has run: Channel.failure says it, and
// handlers of later launches return it.
#pragma once

#include <cstdint>

#include "xla/ffi/api/c_api.h"

namespace lamina::cuda {

// How many kernels the handlers of sends and recvs have launched, captured ones included. It stands still while graphs
// are replayed.
std::uint64_t LaunchCount();

}  // namespace lamina::cuda

extern "C" {
XLA_FFI_Error* LaminaCudaSend(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LaminaCudaRecv(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LaminaCudaFence(XLA_FFI_CallFrame* frame);
}
