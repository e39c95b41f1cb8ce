#pragma once

#include <nanobind/nanobind.h>

namespace lamina {

void BindVerbs(nanobind::module_& module);

}  // namespace lamina
