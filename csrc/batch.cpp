#include "batch.h"

#include <pybind11/pybind11.h>

#include <algorithm>

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
  explicit StateCursor(PyObject* state) : state_(state) {}

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
  bool lost_ = false;
};

// For dense tensors of one size: exact coincidence is fine (each element is read before it is written), anything else is not.
bool overlap_in_part(const TensorInfo& a, const TensorInfo& b) {
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  const uintptr_t distance = begin_a > begin_b ? begin_a - begin_b : begin_b - begin_a;
  return distance != 0 && distance < static_cast<uintptr_t>(a.numel() * a.bits / 8);
}

std::string describe(const TensorInfo& t) {
  std::string text = "shape (";
  for (int32_t d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  const char* kind = t.kind == 'f' ? "float" : t.kind == 'b' ? "bfloat" : t.kind == 'c' ? "complex" : "other";
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

void Batch::clear() {
  for (PyObject* object : held_) Py_DECREF(object);
  held_.clear();
  params.clear();
  indices.clear();
  written.clear();
  entries.clear();
  cohorts.clear();
  missing.clear();
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

bool Batch::is_negated(PyObject* tensor) const {
  const int negated = reader_.is_negated(tensor);
  if (negated < 0) throw py::error_already_set();
  return negated;
}

// Null if the parameter can be updated here, else why not.
const char* Batch::classify(PyObject* param, PyObject* grad, TensorInfo& p, Entry& entry) {
  TensorInfo g;
  if (!reader_.read(param, p)) return "the parameter is not a plain strided tensor";
  if (!p.on_cpu) return "the parameter is not on the CPU";
  if (p.kind != 'f' || (p.bits != 32 && p.bits != 64)) return "the parameter is neither float32 nor float64";
  if (!is_dense(p)) return "the parameter's memory has gaps or overlaps";
  if (grad != param) {
    if (!reader_.read(grad, g)) return "the gradient is not a plain strided tensor";
    if (!g.on_cpu) return "the gradient is not on the CPU";
    if (g.kind != p.kind || g.bits != p.bits) return "the gradient's dtype differs from the parameter's";
    if (!same_shape(g, p)) return "the gradient's shape differs from the parameter's";
    if (!same_strides(g, p)) return "the gradient's strides differ from the parameter's";
  }
  if (is_negated(param)) return "the parameter is lazily negated";
  if (grad != param) {
    if (is_negated(grad)) return "the gradient is lazily negated";
    if (overlap_in_part(p, g)) return "the gradient overlaps the parameter's memory";
  }
  entry.run = {p.data, grad == param ? p.data : g.data, {}, p.numel()};
  entry.dtype = p.bits == 32 ? Dtype::kFloat32 : Dtype::kFloat64;
  return nullptr;
}

bool Batch::read_state(size_t index, size_t slot, PyObject* tensor, TensorInfo& out) {
  const size_t position = index * (layout_.slots.size() + 1) + slot;
  if (small_states_.size() <= position) small_states_.resize(position + 1);
  Hold& hold = small_states_[position];
  if (hold.is(tensor)) return reader_.read(tensor, out);
  hold.release();
  if (!reader_.read(tensor, out)) return false;
  if (out.on_cpu && out.numel() * out.bits / 8 <= kMaxHeldBytes) reader_.hold(tensor, hold);
  return true;
}

// For a parameter that torch will step: torch would notice a state of another shape only after it has stepped the parameters before it.
void Batch::check_shapes(PyObject* param_state, const TensorInfo& p) const {
  if (param_state == nullptr || p.data == nullptr) return;
  for (PyObject* slot : layout_.slots) {
    PyObject* const tensor = PyDict_GetItemWithError(param_state, slot);
    if (tensor == nullptr && PyErr_Occurred()) throw py::error_already_set();
    TensorInfo s;
    if (tensor != nullptr && reader_.read(tensor, s) && !same_shape(s, p)) refuse_state(slot, s, p);
  }
}

// False if the states have an honest form that this code does not serve; throws if they are unusable.
bool Batch::attach_states(size_t index, PyObject* param_state, const TensorInfo& p, bool fresh, Entry& entry, const char** because) {
  for (size_t k = 0; k < layout_.slots.size(); ++k) {
    PyObject* const tensor = PyDict_GetItemWithError(param_state, layout_.slots[k]);
    if (tensor == nullptr) no_such_state(index, layout_.slots[k]);
    TensorInfo s;
    if (!read_state(index, k, tensor, s)) return *because = "a state is not a plain strided tensor", false;
    if (!same_shape(s, p) || s.kind != p.kind || s.bits != p.bits) refuse_state(layout_.slots[k], s, p);
    if (!s.on_cpu) return *because = "a state is not on the CPU", false;
    if (!same_strides(s, p)) return *because = "a state's strides differ from the parameter's", false;
    entry.run.states[k] = s.data;
    written.push_back(hold(tensor));
  }
  double step = 0;
  if (layout_.counter != nullptr) {
    PyObject* const tensor = PyDict_GetItemWithError(param_state, layout_.counter);
    TensorInfo c;
    if (tensor == nullptr) no_such_state(index, layout_.counter);
    if (!read_state(index, layout_.slots.size(), tensor, c) || !c.on_cpu || c.kind != 'f' || c.bits < 32 || c.numel() != 1)
      return *because = "the step counter is not a one-element float32 or float64 tensor on the CPU", false;
    entry.counter = c.data;
    entry.counter_is_double = c.bits == 64;
    step = entry.counter_is_double ? *static_cast<double*>(c.data) : *static_cast<float*>(c.data);
    written.push_back(hold(tensor));
  }
  entry.cohort = cohort(step, fresh);
  return true;
}

void Batch::gather(PyObject* param_list, PyObject* state, bool assume_grad) try {
  clear();
  const bool stateful = !layout_.slots.empty() || layout_.counter != nullptr;
  StateCursor cursor(state);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_list); ++i) {
    PyObject* const param = hold(PyList_GET_ITEM(param_list, i));
    PyObject* grad = reader_.grad(param);
    if (grad == nullptr) throw py::error_already_set();
    held_.push_back(grad);
    if (grad == Py_None && assume_grad) grad = param;
    if (grad == Py_None) continue;

    Missing candidate{i, {}, {}};
    Entry& entry = candidate.entry;
    if (const char* because = classify(param, grad, candidate.param, entry)) {
      check_shapes(cursor.find(param), candidate.param);
      declined.emplace_back(i, because);
      continue;
    }
    if (stateful) {
      PyObject* const param_state = cursor.find(param);
      const bool has_states = param_state != nullptr && PyDict_Check(param_state) && PyDict_GET_SIZE(param_state) > 0;
      // A rule that counts has all its states from the first step on; one that does not (SGD) may be given its buffer late.
      PyObject* const first = !has_states ? nullptr : layout_.counter ? Py_True : PyDict_GetItemWithError(param_state, layout_.slots[0]);
      if (first == nullptr || first == Py_None) {
        params.push_back(param);
        indices.push_back(i);
        missing.push_back(std::move(candidate));
        continue;
      }
      const char* because = nullptr;
      if (!attach_states(static_cast<size_t>(i), param_state, candidate.param, false, entry, &because)) {
        declined.emplace_back(i, because);
        continue;
      }
    } else {
      entry.cohort = cohort(0, false);
    }
    params.push_back(param);
    indices.push_back(i);
    entries.push_back(entry);
  }
  const size_t positions = static_cast<size_t>(PyList_GET_SIZE(param_list)) * (layout_.slots.size() + 1);
  if (small_states_.size() > positions) small_states_.resize(positions);
} catch (...) {
  clear();
  throw;
}

void Batch::adopt(size_t i, PyObject* param_state) {
  Missing& m = missing.at(i);
  const char* because = nullptr;
  if (!attach_states(static_cast<size_t>(m.index), param_state, m.param, true, m.entry, &because)) throw std::runtime_error(because);
  entries.push_back(m.entry);
}

bool Batch::shares_memory() {
  ranges_.clear();
  const auto add = [this](const void* data, int64_t bytes, bool write) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (bytes > 0 && data != nullptr) ranges_.push_back({begin, begin + static_cast<uintptr_t>(bytes), write});
  };
  const auto add_entry = [&add](const Entry& e) {
    const int64_t bytes = e.run.count * e.item_size();
    add(e.run.param, bytes, true);
    add(e.run.grad, bytes, false);
    for (const void* data : e.run.states) add(data, bytes, true);
    add(e.counter, e.counter_is_double ? 8 : 4, true);
  };
  for (const Entry& e : entries) add_entry(e);
  for (const Missing& m : missing) add_entry(m.entry);
  // Sorting 5000 ranges costs as much as a step on small tensors, and pointers rarely change from one step to the next.
  if (ranges_ == known_ranges_) return known_to_share_;
  known_ranges_ = ranges_;
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t end = 0, written_end = 0;
  known_to_share_ = false;
  for (const Range& r : ranges_) {
    known_to_share_ |= r.begin < (r.write ? end : written_end);
    end = std::max(end, r.end);
    if (r.write) written_end = std::max(written_end, r.end);
  }
  return known_to_share_;
}

void Batch::count_steps() {
  for (const Entry& e : entries) {
    if (e.counter == nullptr) continue;
    if (e.counter_is_double)
      *static_cast<double*>(e.counter) += 1;
    else
      *static_cast<float*>(e.counter) += 1;
  }
}

}  // namespace fused_opt
