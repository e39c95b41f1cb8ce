// A handler that XLA can compile CUDA programs against where there is neither a GPU nor CUDA's libraries. It declares
// what the handlers of the CUDA channels declare, that a CUDA graph may record it, and fails if it is ever run.

#include "ffi_handlers.h"
#include "xla/ffi/api/ffi.h"

namespace lamina {
namespace {

namespace ffi = xla::ffi;

ffi::Error CompileOnly(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "this program was compiled only to be looked at; compile it on a machine with a GPU to run it");
}

}  // namespace
}  // namespace lamina

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaCompileOnly, lamina::CompileOnly,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
