// How a Status becomes an error of XLA.
#pragma once

#include <utility>

#include "wording.h"
#include "xla/ffi/api/ffi.h"

namespace lamina {

inline xla::ffi::Error ToError(Status status) {
  using xla::ffi::Error;
  using xla::ffi::ErrorCode;
  switch (status.code) {
    case Code::kOk:
      return Error::Success();
    case Code::kUnavailable:
      return Error(ErrorCode::kUnavailable, std::move(status.text));
    case Code::kDeadlineExceeded:
      return Error(ErrorCode::kDeadlineExceeded, std::move(status.text));
    case Code::kAborted:
      return Error(ErrorCode::kAborted, std::move(status.text));
    case Code::kFailedPrecondition:
      return Error(ErrorCode::kFailedPrecondition, std::move(status.text));
    case Code::kOutOfRange:
      return Error(ErrorCode::kOutOfRange, std::move(status.text));
  }
  return Error::Internal(std::move(status.text));
}

}  // namespace lamina
