// The XLA custom calls lamina_gda_send and lamina_gda_recv, for platform="CUDA". Operands, results and attributes are
// those of the CPU's lamina_send and lamina_recv (../ffi_handlers.cc); both are compatible with command buffers.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* LaminaGdaSend(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LaminaGdaRecv(XLA_FFI_CallFrame* frame);
}
