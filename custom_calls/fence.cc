// A custom call that does nothing but depend on all its operands. XLA keeps data dependences where it drops
// optimization barriers (the CPU backend runs whatever has its operands), so this is what orders computation
// around messages. Results share the operands' memory.

#include <cstring>

#include "ffi_handlers.h"
#include "xla/ffi/api/ffi.h"

namespace lamina {
namespace {

namespace ffi = xla::ffi;

ffi::Error Fence(ffi::RemainingArgs values, ffi::RemainingRets same) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto from = *values.get<ffi::AnyBuffer>(i);
    const auto to = **same.get<ffi::AnyBuffer>(i);
    // XLA gives the result memory of its own where the operand is still needed.
    if (from.untyped_data() != to.untyped_data() && from.size_bytes() != 0) {
      std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lamina

XLA_FFI_DEFINE_HANDLER_SYMBOL(LaminaFence, lamina::Fence, xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets());
