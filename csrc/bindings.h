// What the files that make up the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "isa.h"
#include "tensor_reader.h"

namespace fused_opt {

TensorReader& reader();

// Throws ValueError if there is none of that name, or this CPU lacks it.
const Isa& find_isa(const std::string& name);

// Adds quantize, dequantize and measure to the module.
void add_quantization(pybind11::module_& m);

}  // namespace fused_opt
