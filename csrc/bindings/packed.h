// Weights in panels and a language model made of them, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace llama2rt {

void bind_packed(pybind11::module_& m);

}  // namespace llama2rt
