// call_cache.h - calls that look like an earlier one go straight to its launch. See call_cache.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include "dispatch.h"

namespace nsa_sel {

// run_decode, or what `replace_launches` has put in its place.
int launch(const DecodeLaunch& planned, int device, void* stream);

void bind_call_cache(pybind11::module_& m);

}  // namespace nsa_sel
