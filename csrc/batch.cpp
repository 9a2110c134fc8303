#include "batch.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace fused_opt {
namespace {

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

template <class T>
void increment(void* data) {
  const T x = load<T>(data) + 1;
  std::memcpy(data, &x, sizeof x);
}

// Exact coincidence is fine, since each element is read before it is written; anything else is not.
bool overlap_in_part(const TensorInfo& a, const TensorInfo& b) {
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data), begin_b = reinterpret_cast<uintptr_t>(b.data);
  const bool disjoint =
      begin_a + static_cast<uintptr_t>(bytes_spanned(a)) <= begin_b || begin_b + static_cast<uintptr_t>(bytes_spanned(b)) <= begin_a;
  return !disjoint && !(begin_a == begin_b && a.kind == b.kind && a.bits == b.bits && same_strides(a, b));
}

}  // namespace

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
  entry.place(kParam, p, param_format);
  entry.place(kGrad, g, grad_format);
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
    if (!entry.operands[k].is_aligned()) return "the address of parameter or gradient is no multiple of their element's size";
  }
  return nullptr;
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
      if (const char* because = has_states ? why_not_completed(param_state, candidate) : nullptr) {
        declined.emplace_back(i, because);
        continue;
      }
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
  if (!attach_states(param_state, fresh, missing.at(i), &because))
    throw std::runtime_error("parameter " + std::to_string(missing[i].index) + " of its group cannot be stepped with new states: " +
                             because + "; give the optimizer a contiguous clone of it, or delete its state to start it afresh");
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
