// What a batch reads of optimizer.state.
#include "batch.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fused_opt {
namespace {

// A tensor that only Python refers to is slow to read and to bump the version of (57 and 56 ns against 22 and 16, torch 2.13): each time
// torch takes its first C++ reference to it, and drops it again. So small states, where such costs matter, are kept referred to from C++
// from one step to the next. Not large ones: states that the user has dropped must not stay in memory until the next step.
constexpr int64_t kMaxHeldBytes = 1 << 16;

// The one block size that `numel` elements with so many scales can have; 0 if there is none. (Any that makes one block is the same.)
int64_t block_size_of(int64_t numel, int64_t scales) {
  for (int64_t size = kMinBlock; size <= kMaxBlock; size *= 2)
    if (blocks_of(numel, size) == scales) return size;
  return 0;
}

[[noreturn]] void no_such_state(size_t index, PyObject* key) {
  if (!PyErr_Occurred())
    PyErr_Format(
        PyExc_KeyError,
        "parameter %zu of its group has no state %R; its option was switched on after the first step, or the state_dict is of another "
        "optimizer: delete this parameter's state to start it afresh",
        index, key);
  throw py::error_already_set();
}

[[noreturn]] void refuse_state(PyObject* slot, const TensorInfo& state, const TensorInfo& param) {
  throw std::runtime_error("state '" + std::string(PyUnicode_AsUTF8(slot)) + "' has " + describe(state) + ", but its parameter has " +
                           describe(param) + "; load a state_dict of the same model, or delete this state to start it afresh");
}

}  // namespace

bool Batch::read_state(size_t index, size_t position, PyObject* tensor, TensorInfo& out) {
  position += index * positions();
  if (small_states_.size() <= position) small_states_.resize(position + 1);
  Hold& hold = small_states_[position];
  if (hold.is(tensor)) return reader_.read(tensor, out);
  hold.release();
  if (!reader_.read(tensor, out) || reader_.is_negated(tensor) || reader_.is_conjugated(tensor)) return false;
  const bool inference = reader_.check_inference(tensor);  // a tensor stays what it is, so what is held has been checked
  if (!inference && out.numel() * out.bits / 8 <= kMaxHeldBytes) reader_.hold(tensor, hold);
  return true;
}

// Of a state in 8-bit codes: checks that codes and scales are of the one form that the kernels take.
void Batch::attach_scales(Candidate& candidate, int operand, const TensorInfo& codes, const TensorInfo& first, PyObject* tensor) {
  Entry& entry = candidate.entry;
  const size_t k = static_cast<size_t>(operand - kFirstState), index = static_cast<size_t>(candidate.index);
  const Slot& slot = layout_.slots[k];
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("parameter " + std::to_string(index) + " of its group: " + what +
                             "; load a state_dict that this version wrote, or delete this parameter's state to start it afresh");
  };
  const std::string name = PyUnicode_AsUTF8(slot.name);
  if (!is_codes(codes) || (k > 0) != (entry.block_size > 0)) refuse("some of its states are 8-bit codes and others are not");
  if (entry.operands[kParam].format == Format::kFloat64)
    refuse("its states are 8-bit codes, which needs float32, bfloat16 or float16, but it has " + describe(candidate.param));
  if ((codes.kind == 'u') != slot.non_negative)
    refuse("state '" + name + "' has " + describe(codes) + ", but its codes are " + (slot.non_negative ? "uint8" : "int8"));
  if (!is_dense(codes) || !same_strides(codes, first)) refuse("the codes of its states are not densely packed in one and the same order");
  TensorInfo scales;
  if (!read_state(index, layout_.slots.size() + k, tensor, scales) || !(scales.device == entry.device) || scales.kind != 'f' ||
      scales.bits != 32 || scales.ndim != 1 || !is_dense(scales))
    refuse("the scales of state '" + name + "' are not a contiguous float32 tensor with one dimension, on the parameter's device");
  const int64_t block_size = block_size_of(codes.numel(), scales.numel());
  if (block_size == 0 || (k > 0 && block_size != entry.block_size))
    refuse("state '" + name + "' has " + std::to_string(codes.numel()) + " codes and " + std::to_string(scales.numel()) +
           " scales, which is no block size, or not that of the other states");
  entry.block_size = block_size;
  entry.precision = Precision::kSingle;  // whatever the gradient has
  entry.operands[operand].scales = scales.data;
}

// The tensor under `key`, which must be there.
PyObject* Batch::state(PyObject* param_state, PyObject* key, const Candidate& candidate) {
  PyObject* const tensor = PyDict_GetItemWithError(param_state, key);
  if (tensor == nullptr) no_such_state(static_cast<size_t>(candidate.index), key);
  return hold(tensor);  // before anything that may run other Python code, and another thread: it could replace the state
}

// For a parameter that torch will step: torch would notice a state of another shape only after it has stepped the parameters before it.
void Batch::check_shapes(PyObject* param_state, const TensorInfo& p) const {
  if (param_state == nullptr || p.data == nullptr) return;
  for (const Slot& slot : layout_.slots) {
    PyObject* const tensor = PyDict_GetItemWithError(param_state, slot.name);
    if (tensor == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (tensor == nullptr) continue;
    const py::object held = py::reinterpret_borrow<py::object>(tensor);
    TensorInfo s;
    if (reader_.read(tensor, s) && !same_shape(s, p)) refuse_state(slot.name, s, p);
  }
}

bool is_there(PyObject* param_state, PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(param_state, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value != nullptr && value != Py_None;
}

// A rule that counts has all its states from the first step on; one that does not (SGD) may be given its buffer late.
bool Batch::lacks_rules(PyObject* param_state) const {
  return (layout_.counter && !is_there(param_state, layout_.counter)) ||
         (layout_.late && !layout_.slots.empty() && !is_there(param_state, layout_.slots[0].name));
}

bool is_short(const TensorInfo& t) { return t.bits == 16 && (t.kind == 'b' || t.kind == 'f'); }

// Whether a state that a stage of the group needs is yet to be made. Masks are made for those that the user wants to have one.
bool Batch::lacks_stages(PyObject* param_state, const TensorInfo& param) const {
  for (int k = kAnchor; k < kAllOperands; ++k) {
    PyObject* const name = layout_.stages[k - kMask];
    if (name == nullptr || (k == kCompanion && !is_short(param))) continue;
    if (!is_there(param_state, name)) return true;
  }
  return false;
}

// Null, or why this code does not serve what stages use of a parameter. `tensors` has places for them as Walk takes them.
const char* Batch::attach_stages(PyObject* param_state, Candidate& candidate, TensorInfo* tensors, bool& dense, bool all) {
  const TensorInfo& p = candidate.param;
  Entry& entry = candidate.entry;
  entry.stages = stage::kClamp | stage::kSubgradient | stage::kShrink | stage::kProximal;
  if (p.kind == 'b') entry.stages |= stage::kStochastic;
  for (int k = kMask; k < kAllOperands; ++k) {
    PyObject* const name = layout_.stages[k - kMask];
    if (name == nullptr || (k == kCompanion && !is_short(p))) continue;
    if ((k == kMask || !all) && (param_state == nullptr || !is_there(param_state, name))) continue;
    PyObject* const tensor = state(param_state, name, candidate);
    TensorInfo& s = tensors[k];
    if (!read_state(static_cast<size_t>(candidate.index), 2 * layout_.slots.size() + 1 + static_cast<size_t>(k - kMask), tensor, s))
      return "a state is not a plain strided tensor, or lazily negated or conjugated";
    Format format = k == kMask ? Format::kBool : Format::kInt16;
    const bool known = k == kMask                         ? s.kind == 't'
                       : k == kCompanion && layout_.split ? s.kind == 'i' && s.bits == 16
                                                          : find_format(s, format);
    if (!same_shape(s, p) || is_complex(s) != is_complex(p) || !known) refuse_state(name, s, p);
    if (!(s.device == p.device)) return "a state is on another device than the parameter";
    if (!same_strides(s, p)) {
      dense = false;
      if (k >= kAverage && !surely_disjoint(s)) return "a state's memory may overlap itself";
    }
    const Precision precision = entry.precision;
    entry.place(k, s, format);
    entry.precision = precision;  // that of the rule's operands
    if (entry.in_tables) {
      if (!dense) return "its states are not densely packed in the parameter's order";
      if (format == Format::kFloat64) return "a state is float64";
      if (!entry.operands[k].is_aligned()) return "the address of a state is no multiple of its element's size";
    }
    if (k >= kAverage) written.push_back(tensor);
    entry.stages |= stage::kUses[k - kMask];
  }
  return nullptr;
}

// Null, or why the states have an honest form that this code does not serve; throws if they are unusable, or, of `all`, one is not there.
const char* Batch::attach_existing(PyObject* param_state, Candidate& candidate, TensorInfo* tensors, bool& dense, bool all) {
  const TensorInfo& p = candidate.param;
  Entry& entry = candidate.entry;
  const size_t index = static_cast<size_t>(candidate.index), slots = layout_.slots.size();
  TensorInfo* const states = tensors + kFirstState;
  for (size_t k = 0; k < slots; ++k) {
    const Slot& slot = layout_.slots[k];
    const int operand = kFirstState + static_cast<int>(k);
    if (!all && !is_there(param_state, slot.name)) continue;
    PyObject* const tensor = state(param_state, slot.name, candidate);
    written.push_back(tensor);
    TensorInfo& s = states[k];
    if (!read_state(index, k, tensor, s)) return "a state is not a plain strided tensor, or lazily negated or conjugated";
    Format format = Format::kFloat32;
    const bool codes = is_codes(s) && layout_.takes_codes;
    if (!same_shape(s, p) || is_complex(s) != is_complex(p) || !(codes || find_format(s, format))) refuse_state(slot.name, s, p);
    if (!(s.device == p.device)) return "a state is on another device than the parameter";
    if (!same_strides(s, p)) {
      dense = false;
      if (!surely_disjoint(s)) return "a state's memory may overlap itself";
    }
    entry.place(operand, s, format);
    if (entry.in_tables) {
      if (!dense) return "its states are not densely packed in the parameter's order";
      if (!codes && format == Format::kFloat64) return "a state is float64";
      if (!codes && !entry.operands[operand].is_aligned()) return "the address of a state is no multiple of its element's size";
    }
    if (codes || entry.block_size > 0) {
      PyObject* const scales = codes ? state(param_state, slot.scales, candidate) : nullptr;
      attach_scales(candidate, operand, s, states[0], scales);
      written.push_back(scales);
    }
  }
  if (layout_.counter != nullptr && (all || is_there(param_state, layout_.counter))) {
    PyObject* const tensor = state(param_state, layout_.counter, candidate);
    written.push_back(tensor);
    TensorInfo c;
    if (!read_state(index, 2 * slots, tensor, c) || !(c.device.is_cpu() || (entry.in_tables && c.device == p.device)) || c.kind != 'f' ||
        c.bits < 32 || c.numel() != 1)
      return "the step counter is not a one-element float32 or float64 tensor on the CPU or, where kernels run there, the GPU";
    entry.counter = c.data;
    entry.counter_device = c.device;
    entry.counter_is_double = c.bits == 64;
  }
  return attach_stages(param_state, candidate, tensors, dense, all);
}

// Null, or why this code could not serve the parameter with the states that it has, whatever is made beside them.
const char* Batch::why_not_completed(PyObject* param_state, Candidate candidate) {
  TensorInfo tensors[kAllOperands] = {candidate.param, candidate.grad};
  bool dense = candidate.dense;
  const size_t first_written = written.size();
  const char* const because = attach_existing(param_state, candidate, tensors, dense, false);
  written.resize(first_written);
  return because;
}

// Completes an entry. False if the states have an honest form that this code does not serve; throws if they are unusable.
bool Batch::attach_states(PyObject* param_state, bool fresh, Candidate& candidate, const char** because) {
  const TensorInfo& p = candidate.param;
  Entry& entry = candidate.entry;
  TensorInfo tensors[kAllOperands] = {p, candidate.grad};
  bool dense = candidate.dense;
  const size_t first_written = written.size();
  if ((*because = attach_existing(param_state, candidate, tensors, dense, true)) != nullptr) {
    written.resize(first_written);
    return false;
  }
  const double step = entry.counter == nullptr         ? 0
                      : !entry.counter_device.is_cpu() ? Cohort::kUnknown
                      : entry.counter_is_double        ? load<double>(entry.counter)
                                                       : load<float>(entry.counter);
  entry.cohort = cohort(step, fresh);
  if (!dense && entry.count > 0) {
    const TensorInfo* walked[kAllOperands];
    for (int k = 0; k < kAllOperands; ++k) walked[k] = entry.operands[k].data ? &tensors[k] : &p;
    entry.walk = static_cast<int>(walks.size());
    walks.emplace_back(walked, kAllOperands, entry.block_size > 0 ? kFirstState : kParam);
  }
  return true;
}

}  // namespace fused_opt
