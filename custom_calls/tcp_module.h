// TCP channels as objects of the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace lamina {

void BindTcp(nanobind::module_& module);

}  // namespace lamina
