// What a FailureRecord says, in words.
#pragma once

#include <string>

#include "gda_layout.h"

namespace lamina::cuda::gda {

// Empty while nothing has failed. `peer` is what errors call the other end.
std::string FailureText(const FailureRecord& record, Role role, const std::string& peer, double timeout_s);

// What broke a send queue (QueueState::error), with what to look at.
std::string QueueErrorText(std::uint32_t error);

}  // namespace lamina::cuda::gda
