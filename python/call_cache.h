// call_cache.h - calls that look like an earlier one go straight to its launch. See call_cache.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace nsa_sel {
void bind_call_cache(pybind11::module_& m);
}
