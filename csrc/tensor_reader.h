// Reads torch.Tensor objects without torch's headers, so that one binary serves every torch version.
#pragma once

#include <Python.h>

#include "tensor_info.h"

namespace fused_opt {

// Keeps a tensor alive from C++, through DLPack.
class Hold {
 public:
  Hold() = default;
  ~Hold() { release(); }
  Hold(Hold&& other) noexcept : tensor_(other.tensor_), managed_(other.managed_) { other.managed_ = nullptr; }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

  bool is(PyObject* tensor) const { return managed_ != nullptr && tensor_ == tensor; }
  void release();

 private:
  friend class TensorReader;
  PyObject* tensor_ = nullptr;  // borrowed; the tensor that `managed_` keeps alive keeps it alive
  struct DLManagedTensor* managed_ = nullptr;
};

class TensorReader {
 public:
  // Looks up what it needs in the torch that is imported; throws if there is none.
  TensorReader();

  // False, with no Python error set, if the object is not a plain strided tensor with memory of its own (sparse, meta, subclasses, ...).
  bool read(PyObject* tensor, TensorInfo& out) const;

  // Makes `hold` keep `tensor` alive, if this torch can do that; what it held before is released.
  void hold(PyObject* tensor, Hold& hold) const;

  // New reference to the grad of a tensor (of any subclass), None included. Null with a Python error set on failure.
  PyObject* grad(PyObject* tensor) const;

  // Whether the values are the negatives, or the complex conjugates, of what memory holds (torch does both lazily).
  bool is_negated(PyObject* tensor) const { return ask(is_neg_, tensor); }
  bool is_conjugated(PyObject* tensor) const { return ask(is_conj_, tensor); }

  // Throws what torch throws for a write to a tensor that was made in inference mode, if that is off now. Returns whether it was made so.
  bool check_inference(PyObject* tensor) const;

  // "dlpack" (torch's C exchange table) or "data_ptr" (Python methods, for a torch that lacks the table).
  const char* method() const { return fill_dltensor_ ? "dlpack" : "data_ptr"; }

  // Test hook: read as on a torch that has no exchange table.
  void forget_exchange_table() { fill_dltensor_ = nullptr, make_managed_ = nullptr; }

 private:
  bool is_plain(PyObject* tensor) const;  // a Tensor or Parameter itself, not an instance of a subclass
  bool read_by_methods(PyObject* tensor, TensorInfo& out) const;
  static bool ask(PyMethodDef* method, PyObject* tensor);

  using FillDLTensor = int (*)(void* py_object, struct DLTensor* out);
  using MakeManaged = int (*)(void* py_object, DLManagedTensor** out);
  FillDLTensor fill_dltensor_ = nullptr;
  MakeManaged make_managed_ = nullptr;
  PyObject *tensor_type_, *parameter_type_;
  PyGetSetDef* grad_;
  PyMethodDef *is_neg_, *is_conj_, *is_inference_;
  PyObject* is_inference_mode_enabled_;
};

}  // namespace fused_opt
