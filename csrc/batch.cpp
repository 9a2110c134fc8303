#include "batch.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace fused_opt {
namespace {

// A tensor that only Python refers to is slow to read and to bump the version of (57 and 56 ns against 22 and 16, torch 2.13): each time
// torch takes its first C++ reference to it, and drops it again. So small states, where such costs matter, are kept referred to from C++
// from one step to the next. Not large ones: states that the user has dropped must not stay in memory until the next step.
constexpr int64_t kMaxHeldBytes = 1 << 16;

// Finds each parameter's states in optimizer.state. Hashing a tensor runs Python code (80 ns), so this walks the dict beside the parameter
// list instead, which has the same order except where parameters were added or frozen in between, and asks the dict only when lost.
class StateCursor {
 public:
  StateCursor(PyObject* state, bool lost) : state_(state), lost_(lost) {}

  PyObject* find(PyObject* param) {
    PyObject *key, *value;
    Py_ssize_t position = position_;
    while (PyDict_Next(state_, &position, &key, &value)) {
      if (key == param) {
        position_ = position;
        lost_ = false;
        return value;
      }
      if (lost_) break;  // one scan of the dict each time the order is left; after that only the next place is tried
    }
    lost_ = true;
    value = PyDict_GetItemWithError(state_, param);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* state_;
  Py_ssize_t position_ = 0;
  bool lost_;
};

// Memory at an address that need not be a multiple of the size.
template <class T>
T load(const void* data) {
  T x;
  std::memcpy(&x, data, sizeof x);
  return x;
}

template <class T>
void increment(void* data) {
  const T x = load<T>(data) + 1;
  std::memcpy(data, &x, sizeof x);
}

bool is_complex(const TensorInfo& t) { return t.kind == 'c'; }

int64_t blocks_of(int64_t numel, int64_t block_size) { return (numel + block_size - 1) / block_size; }

// The one block size that `numel` elements with so many scales can have; 0 if there is none. (Any that makes one block is the same.)
int64_t block_size_of(int64_t numel, int64_t scales) {
  for (int64_t size = kMinBlock; size <= kMaxBlock; size *= 2)
    if (blocks_of(numel, size) == scales) return size;
  return 0;
}

int64_t bytes_spanned(const TensorInfo& t) { return span(t) * t.bits / 8; }

// Exact coincidence is fine, since each element is read before it is written; anything else is not.
bool overlap_in_part(const TensorInfo& a, const TensorInfo& b) {
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  const bool disjoint =
      begin_a + static_cast<uintptr_t>(bytes_spanned(a)) <= begin_b || begin_b + static_cast<uintptr_t>(bytes_spanned(b)) <= begin_a;
  return !disjoint && !(begin_a == begin_b && a.kind == b.kind && a.bits == b.bits && same_strides(a, b));
}

void place(Entry& entry, int k, const TensorInfo& t, Format format) {
  entry.operands[k] = {t.data, format, nullptr};
  entry.bytes[k] = bytes_spanned(t);
  if (format == Format::kFloat64) entry.precision = Precision::kDouble;
}

bool is_aligned(const Operand& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % static_cast<uintptr_t>(kFormatBytes[static_cast<int>(operand.format)]) == 0;
}

std::string describe(const TensorInfo& t) {
  std::string text = "shape (";
  for (int32_t d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  const char* kind = t.kind == 'f'   ? "float"
                     : t.kind == 'b' ? "bfloat"
                     : t.kind == 'c' ? "complex"
                     : t.kind == 'i' ? "int"
                     : t.kind == 'u' ? "uint"
                                     : "other";
  return text + "), dtype " + kind + std::to_string(t.bits);
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

void Batch::clear() {
  for (PyObject* object : held_) Py_DECREF(object);
  held_.clear();
  params.clear();
  indices.clear();
  table_indices.clear();
  written.clear();
  entries.clear();
  cohorts.clear();
  missing.clear();
  walks.clear();
  complex.clear();
  mixed.clear();
  declined.clear();
}

PyObject* Batch::hold(PyObject* object) {
  held_.push_back(Py_NewRef(object));
  return object;
}

int Batch::cohort(double step, bool fresh) {
  for (size_t i = cohorts.size(); i-- > 0;)  // nearly always the last one
    if (cohorts[i].step == step && cohorts[i].fresh == fresh) return static_cast<int>(i);
  cohorts.push_back({step, fresh});
  return static_cast<int>(cohorts.size() - 1);
}

// Null if the parameter can be updated here, else why not.
const char* Batch::classify(PyObject* param, PyObject* grad, Candidate& candidate) const {
  TensorInfo &p = candidate.param, &g = candidate.grad;
  Format param_format, grad_format;
  if (!reader_.read(param, p)) return "the parameter is not a plain strided tensor";
  const Server server = servers_.of(p.device);
  if (server == Server::kNobody) return p.device.is_cpu() ? "the parameter is on the CPU" : "the parameter is not on the CPU";
  if (!find_format(p, param_format)) return "the parameter's dtype is neither a floating point nor a complex one";
  const bool dense = is_dense(p);
  if (!dense && !surely_disjoint(p)) {
    for (int32_t d = 0; d < p.ndim; ++d)
      if (p.shape[d] > 1 && p.strides[d] == 0)
        throw std::runtime_error("parameter " + std::to_string(candidate.index) + " of its group has " + describe(p) +
                                 " and is expanded: several of its elements are one memory location, which cannot be stepped; clone() it");
    return "the parameter's memory may overlap itself";
  }
  if (!reader_.read(grad, g)) return "the gradient is not a plain strided tensor";
  if (!(g.device == p.device)) return "the gradient is on another device than the parameter";
  if (!find_format(g, grad_format)) return "the gradient's dtype is neither a floating point nor a complex one";
  if (is_complex(g) != is_complex(p)) return "of parameter and gradient only one is complex";
  if (!same_shape(g, p)) return "the gradient's shape differs from the parameter's";
  reader_.check_inference(param);
  for (PyObject* tensor : {param, grad}) {
    if (reader_.is_negated(tensor)) return "the parameter or the gradient is lazily negated";
    if (is_complex(p) && reader_.is_conjugated(tensor)) return "the parameter or the gradient is lazily conjugated";
  }
  if (overlap_in_part(p, g)) return "the gradient overlaps the parameter's memory";
  Entry& entry = candidate.entry;
  entry.count = p.numel() * (is_complex(p) ? 2 : 1);
  entry.precision = Precision::kSingle;
  place(entry, kParam, p, param_format);
  place(entry, kGrad, g, grad_format);
  candidate.dense = dense && same_strides(g, p);
  entry.device = p.device;
  entry.in_tables = server == Server::kTables;
  return entry.in_tables ? why_not_in_tables(candidate) : nullptr;
}

// Kernels on a device compute in fp32 and take elements in the order of memory.
const char* Batch::why_not_in_tables(const Candidate& candidate) const {
  const Entry& entry = candidate.entry;
  if (!candidate.dense) return "parameter or gradient are not densely packed in one and the same order";
  for (const int k : {kParam, kGrad}) {
    if (entry.operands[k].format == Format::kFloat64) return "parameter or gradient are float64";
    if (!is_aligned(entry.operands[k])) return "the address of parameter or gradient is no multiple of their element's size";
  }
  return nullptr;
}

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
const char* Batch::attach_stages(PyObject* param_state, Candidate& candidate, TensorInfo* tensors, bool& dense) {
  constexpr unsigned kFlags[kStageOperands] = {stage::kMasked, stage::kPull, stage::kAveraged, stage::kWithCompanion};
  const TensorInfo& p = candidate.param;
  Entry& entry = candidate.entry;
  entry.stages = stage::kClamp | stage::kSubgradient | stage::kShrink | stage::kProximal;
  if (p.kind == 'b') entry.stages |= stage::kStochastic;
  for (int k = kMask; k < kAllOperands; ++k) {
    PyObject* const name = layout_.stages[k - kMask];
    if (name == nullptr || (k == kCompanion && !is_short(p))) continue;
    if (k == kMask && (param_state == nullptr || !is_there(param_state, name))) continue;
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
    place(entry, k, s, format);
    entry.precision = precision;  // that of the rule's operands
    if (entry.in_tables) {
      if (!dense) return "its states are not densely packed in the parameter's order";
      if (format == Format::kFloat64) return "a state is float64";
      if (!is_aligned(entry.operands[k])) return "the address of a state is no multiple of its element's size";
    }
    if (k >= kAverage) written.push_back(tensor);
    entry.stages |= kFlags[k - kMask];
  }
  return nullptr;
}

// False if the states have an honest form that this code does not serve; throws if they are unusable.
bool Batch::attach_states(PyObject* param_state, bool fresh, Candidate& candidate, const char** because) {
  const TensorInfo& p = candidate.param;
  Entry& entry = candidate.entry;
  const size_t index = static_cast<size_t>(candidate.index), slots = layout_.slots.size();
  TensorInfo tensors[kAllOperands] = {p, candidate.grad};
  TensorInfo* const states = tensors + kFirstState;
  const size_t first_written = written.size();
  bool dense = candidate.dense;
  for (size_t k = 0; k < slots; ++k) {
    const Slot& slot = layout_.slots[k];
    const int operand = kFirstState + static_cast<int>(k);
    PyObject* const tensor = state(param_state, slot.name, candidate);
    written.push_back(tensor);
    TensorInfo& s = states[k];
    const auto decline = [&](const char* reason) {
      written.resize(first_written);
      *because = reason;
      return false;
    };
    if (!read_state(index, k, tensor, s)) return decline("a state is not a plain strided tensor, or lazily negated or conjugated");
    Format format = Format::kFloat32;
    const bool codes = is_codes(s) && layout_.takes_codes;
    if (!same_shape(s, p) || is_complex(s) != is_complex(p) || !(codes || find_format(s, format))) refuse_state(slot.name, s, p);
    if (!(s.device == p.device)) return decline("a state is on another device than the parameter");
    if (!same_strides(s, p)) {
      dense = false;
      if (!surely_disjoint(s)) return decline("a state's memory may overlap itself");
    }
    place(entry, operand, s, format);
    if (entry.in_tables) {
      if (!dense) return decline("its states are not densely packed in the parameter's order");
      if (!codes && format == Format::kFloat64) return decline("a state is float64");
      if (!codes && !is_aligned(entry.operands[operand])) return decline("the address of a state is no multiple of its element's size");
    }
    if (codes || entry.block_size > 0) {
      PyObject* const scales = codes ? state(param_state, slot.scales, candidate) : nullptr;
      attach_scales(candidate, operand, s, states[0], scales);
      written.push_back(scales);
    }
  }
  double step = 0;
  if (layout_.counter != nullptr) {
    PyObject* const tensor = state(param_state, layout_.counter, candidate);
    written.push_back(tensor);
    TensorInfo c;
    if (!read_state(index, 2 * slots, tensor, c) || !(c.device.is_cpu() || (entry.in_tables && c.device == p.device)) || c.kind != 'f' ||
        c.bits < 32 || c.numel() != 1) {
      written.resize(first_written);
      return *because = "the step counter is not a one-element float32 or float64 tensor on the CPU or, where kernels run there, the GPU",
             false;
    }
    entry.counter = c.data;
    entry.counter_device = c.device;
    entry.counter_is_double = c.bits == 64;
    step = !c.device.is_cpu() ? Cohort::kUnknown : entry.counter_is_double ? load<double>(c.data) : load<float>(c.data);
  }
  if (const char* reason = attach_stages(param_state, candidate, tensors, dense)) {
    written.resize(first_written);
    return *because = reason, false;
  }
  entry.cohort = cohort(step, fresh);
  if (!dense && entry.count > 0) {
    const TensorInfo* walked[kAllOperands];
    for (int k = 0; k < kAllOperands; ++k) walked[k] = entry.operands[k].data ? &tensors[k] : &p;
    entry.walk = static_cast<int>(walks.size());
    walks.emplace_back(walked, kAllOperands, entry.block_size > 0 ? kFirstState : kParam);
  }
  return true;
}

bool Batch::gather(PyObject* param_list, PyObject* state, bool assume_grad, const Servers& servers, int64_t first_number) try {
  clear();
  servers_ = servers;
  const auto asks = [this](int k) { return layout_.stages[k - kMask] != nullptr; };
  const bool masked = asks(kMask), staged = asks(kAnchor) || asks(kAverage) || asks(kCompanion);
  const bool needs_states = !layout_.slots.empty() || layout_.counter != nullptr || staged, stateful = needs_states || masked;
  StateCursor cursor(state, PyList_GET_SIZE(param_list) == 1);  // a single parameter may be anywhere
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_list); ++i) {
    PyObject* const param = hold(PyList_GET_ITEM(param_list, i));
    PyObject* grad = reader_.grad(param);
    if (grad == nullptr) throw py::error_already_set();
    held_.push_back(grad);
    if (grad == Py_None && assume_grad) grad = param;
    if (grad == Py_None) continue;

    Candidate candidate{i, {}, {}, false, {}};
    candidate.entry.number = first_number + i;
    if (const char* because = classify(param, grad, candidate)) {
      check_shapes(cursor.find(param), candidate.param);
      declined.emplace_back(i, because);
      continue;
    }
    const bool complex_valued = is_complex(candidate.param), candidate_in_tables = candidate.entry.in_tables;  // it may be moved from below
    PyObject* const param_state = stateful ? cursor.find(param) : nullptr;
    if (param_state != nullptr) hold(param_state);
    const bool has_states = param_state != nullptr && PyDict_Check(param_state) && PyDict_GET_SIZE(param_state) > 0;
    if (needs_states && (!has_states || lacks_rules(param_state) || (staged && lacks_stages(param_state, candidate.param)))) {
      missing.push_back(std::move(candidate));
    } else {
      const char* because = nullptr;
      if (!attach_states(param_state, false, candidate, &because)) {
        declined.emplace_back(i, because);
        continue;
      }
      entries.push_back(candidate.entry);
    }
    if (complex_valued) complex.push_back(i);
    if (candidate.entry.operands[kParam].format != candidate.entry.operands[kGrad].format) mixed.push_back(i);
    params.push_back(param);
    indices.push_back(i);
    if (candidate_in_tables) table_indices.push_back(i);
  }
  const size_t held = static_cast<size_t>(PyList_GET_SIZE(param_list)) * positions();
  if (small_states_.size() > held) small_states_.resize(held);
  return !missing.empty() || !declined.empty() || !mixed.empty() || !complex.empty();
} catch (...) {
  clear();
  throw;
}

void Batch::adopt(size_t i, PyObject* param_state, bool fresh) {
  const char* because = nullptr;
  if (!attach_states(param_state, fresh, missing.at(i), &because)) throw std::runtime_error(because);
  entries.push_back(missing[i].entry);
}

void Batch::append_ranges(std::vector<Range>& ranges) const {
  const auto append = [&ranges](const void* data, int64_t bytes, bool write) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (bytes > 0 && data != nullptr) ranges.push_back({begin, begin + static_cast<uintptr_t>(bytes), write});
  };
  const auto append_entry = [&append](const Entry& e) {
    for (int k = 0; k < kAllOperands; ++k) {
      append(e.operands[k].data, e.bytes[k], k != kGrad && k != kMask && k != kAnchor);
      if (e.operands[k].scales) append(e.operands[k].scales, blocks_of(e.count, e.block_size) * int64_t(sizeof(float)), true);
    }
    append(e.counter, e.counter_is_double ? 8 : 4, true);
  };
  for (const Entry& e : entries) append_entry(e);
  for (const Candidate& m : missing) append_entry(m.entry);
}

Format Batch::kernel_format(const Entry& entry, unsigned stages) const {
  const Format own = entry.operands[kParam].format;
  bool common = entry.walk < 0 && stages == 0;
  for (int k = 0; k < operand_count(); ++k) common &= entry.operands[k].format == own || entry.operands[k].scales;
  return common ? own : entry.precision == Precision::kSingle ? Format::kFloat32 : Format::kFloat64;
}

void Batch::count_steps(bool on_device) {
  for (const Entry& e : entries) {
    if (e.counter == nullptr || !e.counter_device.is_cpu() || (on_device && e.in_tables && e.counter_device == e.device)) continue;
    if (e.counter_is_double)
      increment<double>(e.counter);
    else
      increment<float>(e.counter);
  }
}

}  // namespace fused_opt
