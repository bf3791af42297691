// The functions that `_cuda` and the emulator's module have in common.
#pragma once

#include <pybind11/pybind11.h>

namespace llama2rt {

void bind_kernels(pybind11::module_& m);

}  // namespace llama2rt
