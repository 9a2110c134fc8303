#include "tensor_reader.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace fused_opt {

// The part of DLPack's C interface that is used here (https://dmlc.github.io/dlpack/latest/c_api.html, version 1).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {  // DLManagedTensorVersioned; only its deleter is used
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
};

namespace {

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_py_object_no_sync)(void* py_object, DLManagedTensor** out);
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

// Some tensors are strided and have elements but no memory, such as those that torch knows to be all zero.
bool has_memory(const TensorInfo& t) { return t.data != nullptr || t.numel() == 0; }

constexpr uint32_t kDLPackMajor = 1;
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6 };

}  // namespace

TensorReader::TensorReader() {
  const py::object torch = py::module_::import("torch");
  // References are kept for the life of the process: torch's types outlive every optimizer.
  tensor_type_ = py::object(torch.attr("Tensor")).release().ptr();
  parameter_type_ = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
  const py::object methods = torch.attr("_C").attr("TensorBase").attr("__dict__");
  const py::object grad = methods["grad"];
  if (!Py_IS_TYPE(grad.ptr(), &PyGetSetDescr_Type))
    throw std::runtime_error("this torch is unlike any known one: Tensor.grad is not built in");
  grad_ = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  const auto question = [&methods](const char* name) {
    const py::object method = methods[name];
    PyMethodDef* const def =
        Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type) ? reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method : nullptr;
    if (def == nullptr || (def->ml_flags & METH_NOARGS) == 0)
      throw std::runtime_error("this torch is unlike any known one: Tensor." + std::string(name) + " is not built in, or takes arguments");
    return def;
  };
  is_neg_ = question("is_neg");
  is_conj_ = question("is_conj");
  is_inference_ = question("is_inference");
  is_inference_mode_enabled_ = py::object(torch.attr("is_inference_mode_enabled")).release().ptr();

  const py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return;
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major != kDLPackMajor) api = api->previous;
  if (api == nullptr) return;
  fill_dltensor_ = api->dltensor_from_py_object_no_sync;
  make_managed_ = api->managed_tensor_from_py_object_no_sync;
}

void Hold::release() {
  if (managed_ != nullptr) managed_->deleter(managed_);
  managed_ = nullptr;
}

void TensorReader::hold(PyObject* tensor, Hold& hold) const {
  hold.release();
  hold.tensor_ = tensor;
  if (make_managed_ != nullptr && make_managed_(tensor, &hold.managed_) != 0) {
    PyErr_Clear();
    hold.managed_ = nullptr;
  }
}

bool TensorReader::is_plain(PyObject* tensor) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == parameter_type_ || type == tensor_type_;
}

bool TensorReader::read(PyObject* tensor, TensorInfo& out) const {
  if (!is_plain(tensor)) return false;
  if (fill_dltensor_ == nullptr) return read_by_methods(tensor, out);

  DLTensor t;
  if (fill_dltensor_(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.shape = t.shape;
  out.strides = t.strides;
  out.ndim = t.ndim;
  out.device = {t.device_type, t.device_id};
  out.kind = t.dtype_code == kDLFloat     ? 'f'
             : t.dtype_code == kDLBfloat  ? 'b'
             : t.dtype_code == kDLComplex ? 'c'
             : t.dtype_code == kDLInt     ? 'i'
             : t.dtype_code == kDLUInt    ? 'u'
             : t.dtype_code == kDLBool    ? 't'
                                          : '?';
  out.bits = t.dtype_bits;
  return has_memory(out);
}

bool TensorReader::read_by_methods(PyObject* object, TensorInfo& out) const {
  const py::handle tensor(object);
  try {
    if (py::str(tensor.attr("layout")).cast<std::string>() != "torch.strided") return false;
    const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    const bool is_float = dtype == "torch.float32" || dtype == "torch.float64" || dtype == "torch.float16";
    const bool is_complex = tensor.attr("is_complex")().cast<bool>();
    const bool is_int = dtype.rfind("torch.int", 0) == 0;
    out.kind = is_float                    ? 'f'
               : is_complex                ? 'c'
               : dtype == "torch.bfloat16" ? 'b'
               : is_int                    ? 'i'
               : dtype == "torch.uint8"    ? 'u'
               : dtype == "torch.bool"     ? 't'
                                           : '?';
    out.bits = static_cast<uint8_t>(8 * tensor.attr("element_size")().cast<int>());
    const auto device = tensor.attr("device").attr("type").cast<std::string>();
    out.device.type = device == "cpu" ? Device::kCpu : device == "cuda" ? Device::kCuda : 0;  // ROCm's name in torch is cuda, too
    out.device.index = out.device.is_gpu() ? tensor.attr("device").attr("index").cast<int32_t>() : 0;
    out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    out.owned_dims.clear();
    for (const char* name : {"size", "stride"})
      for (const py::handle dim : tensor.attr(name)()) out.owned_dims.push_back(dim.cast<int64_t>());
    out.ndim = static_cast<int32_t>(out.owned_dims.size() / 2);
    out.shape = out.owned_dims.data();
    out.strides = out.owned_dims.data() + out.ndim;
    return has_memory(out);
  } catch (const py::error_already_set&) {
    return false;
  }
}

PyObject* TensorReader::grad(PyObject* tensor) const {
  // As PyObject_GetAttr(tensor, "grad"), without the search through the type's bases.
  return is_plain(tensor) ? grad_->get(tensor, grad_->closure) : PyObject_GetAttrString(tensor, "grad");
}

bool TensorReader::check_inference(PyObject* tensor) const {
  if (!ask(is_inference_, tensor)) return false;
  if (!py::handle(is_inference_mode_enabled_)().cast<bool>())
    throw std::runtime_error(
        "Inplace update to inference tensor outside InferenceMode is not allowed: a parameter, or a state, was made under "
        "torch.inference_mode(); make it elsewhere, clone() it here, or step in that mode");
  return true;
}

bool TensorReader::ask(PyMethodDef* method, PyObject* tensor) {
  PyObject* const answer = method->ml_meth(tensor, nullptr);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);  // True and False outlive this
  return answer == Py_True;
}

}  // namespace fused_opt
