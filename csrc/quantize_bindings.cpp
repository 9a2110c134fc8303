// Quantization as Python calls it; see fused_opt/quantization.py for its use.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "quantize.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

TensorInfo read_tensor(const py::handle& tensor, const std::string& what) {
  TensorInfo info;
  if (!reader().read(tensor.ptr(), info) || !info.device.is_cpu() || reader().is_negated(tensor.ptr()))
    throw py::value_error(what + " must be a plain strided tensor on the CPU, not lazily negated; clone() it there");
  return info;
}

TensorInfo read_floats(const py::handle& tensor, const std::string& what, int64_t count) {
  const TensorInfo info = read_tensor(tensor, what);
  if (info.kind != 'f' || info.bits != 32 || !is_dense(info) || info.numel() != count)
    throw py::value_error(what + " must be float32, contiguous, of " + std::to_string(count) + " elements");
  return info;
}

Code find_code(const std::string& name) {
  for (int i = 0; i < kCodes; ++i)
    if (name == kCodeNames[i]) return static_cast<Code>(i);
  throw py::value_error("unknown code '" + name + "'");
}

// `code` is a name, or a tensor of the 256 ascending numbers that the codes stand for.
Quantized read_quantized(const py::object& values, const py::object& codes, const py::object& scales, int64_t block_size,
                         const py::object& code) {
  const TensorInfo v = read_tensor(values, "the tensor"), c = read_tensor(codes, "codes");
  Format format;
  if (!find_format(v, format) || v.kind == 'c') throw py::value_error("the tensor must be float32, float64, bfloat16 or float16");
  if (!is_codes(c) || !is_dense(c) || !same_shape(v, c)) throw py::value_error("codes must be bytes, densely packed, one for each value");
  if (block_size < 1) throw py::value_error("block size must be positive");
  const int64_t count = v.numel();
  const TensorInfo s = read_floats(scales, "scales", (count + block_size - 1) / block_size);
  const bool named = py::isinstance<py::str>(code);
  const TensorInfo* const tensors[] = {&v, &c};
  return {static_cast<char*>(v.data),
          format,
          Walk(tensors, 2, 1),
          static_cast<uint8_t*>(c.data),
          static_cast<float*>(s.data),
          count,
          block_size,
          named ? find_code(code.cast<std::string>()) : Code::kLinear,
          named ? nullptr : static_cast<const float*>(read_floats(code, "the table of a code", 256).data)};
}

// None, an integer, or an int64 tensor with one for each block.
Seeds read_seeds(const py::object& seed, const Quantized& q) {
  if (seed.is_none()) return {false, 0, nullptr};
  if (py::isinstance<py::int_>(seed)) return {true, seed.cast<uint64_t>(), nullptr};
  const TensorInfo s = read_tensor(seed, "seeds");
  if (s.kind != 'i' || s.bits != 64 || !is_dense(s) || s.numel() != (q.count + q.block_size - 1) / q.block_size)
    throw py::value_error("seeds must be int64, contiguous, one for each block");
  return {true, 0, static_cast<const uint64_t*>(s.data)};
}

}  // namespace

void add_quantization(py::module_& m) {
  m.def(
      "measure",
      [](const py::object& values, const py::object& codes, const py::object& scales, int64_t block_size, const std::string& isa,
         int max_threads) {
        const Quantized q = read_quantized(values, codes, scales, block_size, py::str(kCodeNames[0]));
        py::gil_scoped_release release;
        measure(q, find_isa(isa), max_threads);
      },
      py::arg("values"), py::arg("codes"), py::arg("scales"), py::arg("block_size"), py::arg("isa"), py::arg("max_threads"));
  m.def(
      "quantize",
      [](const py::object& values, const py::object& codes, const py::object& scales, int64_t block_size, const py::object& code,
         bool measured, const py::object& seed, const std::string& isa, int max_threads) {
        const Quantized q = read_quantized(values, codes, scales, block_size, code);
        const Seeds seeds = read_seeds(seed, q);
        if (!measured && block_size > kMaxBlock) throw py::value_error("longer blocks must be measured first");
        py::gil_scoped_release release;
        quantize(q, measured, seeds, find_isa(isa), max_threads);
      },
      py::arg("values"), py::arg("codes"), py::arg("scales"), py::arg("block_size"), py::arg("code"), py::arg("measured"), py::arg("seed"),
      py::arg("isa"), py::arg("max_threads"));
  m.def(
      "dequantize",
      [](const py::object& values, const py::object& codes, const py::object& scales, int64_t block_size, const py::object& code,
         const std::string& isa, int max_threads) {
        const Quantized q = read_quantized(values, codes, scales, block_size, code);
        py::gil_scoped_release release;
        dequantize(q, find_isa(isa), max_threads);
      },
      py::arg("values"), py::arg("codes"), py::arg("scales"), py::arg("block_size"), py::arg("code"), py::arg("isa"),
      py::arg("max_threads"));
}

}  // namespace fused_opt
