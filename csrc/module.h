// What other files than module.cpp add to fused_lstm._C.
#pragma once

#include <pybind11/pybind11.h>

void define_stream(pybind11::module_& m);
void define_sampler(pybind11::module_& m);
void define_mask(pybind11::module_& m);
