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

// Add to the module: quantize, dequantize and measure; Tables.
void add_quantization(pybind11::module_& m);
void add_tables(pybind11::module_& m);

}  // namespace fused_opt
