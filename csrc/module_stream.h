// What csrc/module_stream.cpp adds to fused_lstm._C.
#pragma once

#include <pybind11/pybind11.h>

void define_stream(pybind11::module_& m);
