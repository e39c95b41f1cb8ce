// The XLA custom calls on the CPU: see ops.py for their operands and results.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* LaminaSend(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LaminaRecv(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LaminaFence(XLA_FFI_CallFrame* frame);
// Stands in for the handlers of a GPU where programs for it are only compiled.
XLA_FFI_Error* LaminaCompileOnly(XLA_FFI_CallFrame* frame);
}
