// The Python module fused_opt._cpu: names and conversions, no arithmetic. See fused_opt/native.py for its use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "batch.h"
#include "bindings.h"
#include "norm.h"
#include "parallel.h"

namespace py = pybind11;

namespace fused_opt {

const Isa& find_isa(const std::string& name) {
  for (int i = 0; i < isa_count; ++i)
    if (name == isas[i].name) {
      if (!isas[i].supported()) throw py::value_error("this CPU cannot run " + name);
      return isas[i];
    }
  throw py::value_error("unknown instruction set '" + name + "'");
}

TensorReader& reader() {
  static TensorReader* const instance = new TensorReader();  // never destroyed: batches may outlive the module
  return *instance;
}

namespace {

struct RuleInfo {
  const char* name;
  const KernelsByFormat* KernelTable::* kernels;
  unsigned flag_combinations;
  size_t scalars;
};

constexpr RuleInfo rules[] = {
    {"adam", &KernelTable::adam, adam::kFlagCombinations, adam::kScalars},
    {"rmsprop", &KernelTable::rmsprop, rmsprop::kFlagCombinations, rmsprop::kScalars},
    {"sgd", &KernelTable::sgd, sgd::kFlagCombinations, sgd::kScalars},
};

const RuleInfo& find_rule(const std::string& name) {
  for (const RuleInfo& rule : rules)
    if (name == rule.name) return rule;
  throw py::value_error("unknown rule '" + name + "'; it must be adam, rmsprop or sgd");
}

// Where each kernel starts, for the test that disassembles them: (isa, rule, flags, formats, address).
using KernelAddress = std::tuple<const char*, const char*, unsigned, std::string, uintptr_t>;

std::vector<KernelAddress> kernel_addresses() {
  std::vector<KernelAddress> list;
  for (int i = 0; i < isa_count; ++i)
    for (const RuleInfo& rule : rules)
      for (unsigned flags = 0; flags < rule.flag_combinations; ++flags)
        for (int format = 0; format < kFormats; ++format) {
          const KernelsByFormat& kernels = (isas[i].kernels->*rule.kernels)[flags];
          const auto append = [&](Kernel kernel, const std::string& states) {
            list.emplace_back(isas[i].kernels->isa, rule.name, flags, kFormatNames[format] + states, reinterpret_cast<uintptr_t>(kernel));
          };
          append(kernels.at[format], "");
          if (kernels.blocks[format]) append(kernels.blocks[format], " int8");
          if (format != static_cast<int>(Format::kBFloat16)) continue;
          if (kernels.stochastic) append(kernels.stochastic, " stochastic");
          if (kernels.stochastic_blocks) append(kernels.stochastic_blocks, " int8 stochastic");
        }
  return list;
}

// Where the code of each instruction set starts, for the same test: the first of all functions that its table leads to.
std::vector<std::pair<const char*, uintptr_t>> code_starts() {
  std::vector<std::pair<const char*, uintptr_t>> starts;
  for (int i = 0; i < isa_count; ++i) {
    const KernelTable& table = *isas[i].kernels;
    std::vector<uintptr_t> functions = {reinterpret_cast<uintptr_t>(table.block_codecs->largest_magnitude)};
    for (const auto& [isa, rule, flags, format, address] : kernel_addresses())
      if (isa == table.isa) functions.push_back(address);
    for (int precision = 0; precision < kPrecisions; ++precision)
      for (const Codec& codec : table.codecs[precision].at) {
        functions.push_back(reinterpret_cast<uintptr_t>(codec.decode));
        functions.push_back(reinterpret_cast<uintptr_t>(codec.encode));
      }
    for (const BlockCodec& codec : table.block_codecs->at) {
      functions.push_back(reinterpret_cast<uintptr_t>(codec.decode));
      functions.push_back(reinterpret_cast<uintptr_t>(codec.encode));
    }
    starts.emplace_back(table.isa, *std::min_element(functions.begin(), functions.end()));
  }
  return starts;
}

using SlotNames = std::tuple<std::string, std::string, bool>;  // the members of Slot

PyObject* interned(const std::string& name) { return name.empty() ? nullptr : PyUnicode_InternFromString(name.c_str()); }

Layout make_layout(const std::vector<SlotNames>& slots, const std::string& counter, bool takes_codes, bool late,
                   const std::vector<std::string>& stages, bool split) {
  if (slots.size() > kMaxStates) throw py::value_error("a rule has at most " + std::to_string(kMaxStates) + " states");
  if (!stages.empty() && stages.size() != kStageOperands)
    throw py::value_error("stages have " + std::to_string(kStageOperands) + " states, or none");
  Layout layout{{}, interned(counter), takes_codes, late, {}, split};
  for (size_t k = 0; k < stages.size(); ++k) layout.stages[k] = interned(stages[k]);
  for (const auto& [name, scales, non_negative] : slots)
    layout.slots.push_back({PyUnicode_InternFromString(name.c_str()), PyUnicode_InternFromString(scales.c_str()), non_negative});
  return layout;  // interned keys are kept for the life of the process: there are some twenty of them in all
}

py::list to_list(const std::vector<PyObject*>& objects) {
  py::list list;
  for (PyObject* object : objects) list.append(py::handle(object));
  return list;
}

using Programs = std::vector<std::pair<unsigned, std::vector<double>>>;  // flags and scalars, one pair a cohort

// Returns what ran, as told by the code that did it: the instruction set is the name compiled into the kernels' own object file, and the
// number of threads is OpenMP's own; 0 if there was nothing to do for it.
std::pair<const char*, int> run(Batch& batch, const std::string& rule_name, const Programs& programs, const std::string& isa_name,
                                int max_threads, bool on_device, const Programs& stages) {
  const RuleInfo& rule = find_rule(rule_name);
  const Isa& isa = find_isa(isa_name);
  if (programs.size() != batch.cohorts.size() || (!stages.empty() && stages.size() != programs.size()))
    throw py::value_error("one program per cohort is needed");
  std::vector<Task> tasks;
  tasks.reserve(batch.entries.size());
  for (const Entry& entry : batch.entries) {
    if (entry.in_tables) continue;
    const auto& [flags, scalars] = programs[static_cast<size_t>(entry.cohort)];
    if (flags >= rule.flag_combinations || scalars.size() != rule.scalars)
      throw py::value_error("rule " + rule_name + " takes " + std::to_string(rule.scalars) + " scalars and flags below " +
                            std::to_string(rule.flag_combinations));
    const auto* const staged = stages.empty() ? nullptr : &stages[static_cast<size_t>(entry.cohort)];
    if (staged && (staged->first >= stage::kFlagCombinations || (staged->first != 0 && staged->second.size() != stage::kScalars)))
      throw py::value_error("stages take " + std::to_string(stage::kScalars) + " scalars and flags below " +
                            std::to_string(stage::kFlagCombinations));
    unsigned stage_flags = staged ? staged->first & entry.stages : 0;
    if (stage_flags & stage::kAveraged && staged->second[stage::kAverageWeight] == 0) stage_flags &= ~stage::kAveraged;  // not this time
    const KernelsByFormat& kernels = (isa.kernels->*rule.kernels)[flags];
    const bool in_blocks = entry.block_size > 0;
    Kernel kernel = in_blocks ? kernels.stochastic_blocks : kernels.stochastic;
    if (stage_flags == stage::kStochastic && kernel != nullptr && batch.kernel_format(entry, 0) == Format::kBFloat16) {
      stage_flags = 0;
    } else {
      kernel = (in_blocks ? kernels.blocks : kernels.at)[static_cast<int>(batch.kernel_format(entry, stage_flags))];
    }
    const Format format = batch.kernel_format(entry, stage_flags);
    const CodecsByFormat* const codecs = &isa.kernels->codecs[static_cast<int>(entry.precision)];
    const Walk* const walk = entry.walk < 0 ? nullptr : &batch.walks[static_cast<size_t>(entry.walk)];
    tasks.push_back({kernel, format, scalars.data(), codecs, entry.operands, walk, entry.count, entry.block_size,
                     &isa.kernels->stages[static_cast<int>(entry.precision)], stage_flags, staged ? staged->second.data() : nullptr,
                     entry.number});
  }
  int threads = 0;
  {
    py::gil_scoped_release release;
    if (!tasks.empty()) threads = run_parallel(tasks, max_threads);
    batch.count_steps(on_device);
  }
  return {isa.kernels->isa, threads};
}

double gradient_norm_of(const Batch& batch, const std::string& isa_name, bool largest, int max_threads) {
  const Isa& isa = find_isa(isa_name);
  const py::gil_scoped_release release;
  return gradient_norm(batch, isa, largest, max_threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fused_opt. Internal: use the classes of fused_opt.";

  m.def(
      "isas",
      [] {
        std::vector<std::pair<std::string, bool>> list;
        for (int i = 0; i < isa_count; ++i) list.emplace_back(isas[i].name, isas[i].supported());
        return list;
      },
      "The instruction sets compiled in, plainest first, each with whether this CPU runs it.");
  m.def("reader", [] { return reader().method(); }, "How tensors are read: 'dlpack' or 'data_ptr'.");
  m.def("forget_exchange_table", [] { reader().forget_exchange_table(); }, "Test hook.");
  m.def("kernel_addresses", kernel_addresses, "Test hook.");
  m.def("code_starts", code_starts, "Test hook.");
  m.attr("compiler") = __VERSION__;

  py::class_<Batch>(m, "Batch")
      .def(py::init([](const std::vector<SlotNames>& slots, const std::string& counter, bool takes_codes, bool late,
                       const std::vector<std::string>& stages, bool split) {
             return std::make_unique<Batch>(reader(), make_layout(slots, counter, takes_codes, late, stages, split));
           }),
           py::arg("slots"), py::arg("counter"), py::arg("takes_codes"), py::arg("late") = false,
           py::arg("stages") = std::vector<std::string>(), py::arg("split") = false)
      .def(
          "gather",
          [](Batch& self, const py::list& params, const py::dict& state, bool assume_grad, int cpu, int gpu, int64_t first_number) {
            return self.gather(params.ptr(), state.ptr(), assume_grad, {static_cast<Server>(cpu), static_cast<Server>(gpu)}, first_number);
          },
          py::arg("params"), py::arg("state"), py::arg("assume_grad") = false, py::arg("cpu") = static_cast<int>(Server::kKernels),
          py::arg("gpu") = static_cast<int>(Server::kNobody), py::arg("first_number") = 0)
      .def(
          "adopt", [](Batch& self, size_t i, const py::dict& state, bool fresh) { self.adopt(i, state.ptr(), fresh); }, py::arg("i"),
          py::arg("state"), py::arg("fresh") = true)
      .def("clear", &Batch::clear)
      .def("run", &run, py::arg("rule"), py::arg("programs"), py::arg("isa"), py::arg("max_threads"), py::arg("on_device") = false,
           py::arg("stages") = Programs())
      .def("gradient_norm", &gradient_norm_of, py::arg("isa"), py::arg("largest"), py::arg("max_threads"))
      .def_property_readonly("table_indices", [](const Batch& self) { return self.table_indices; })
      .def_property_readonly("in_tables", [](const Batch& self) { return !self.table_indices.empty(); })
      .def_property_readonly("in_kernels", [](const Batch& self) { return self.indices.size() > self.table_indices.size(); })
      .def_property_readonly("missing",
                             [](const Batch& self) {
                               std::vector<Py_ssize_t> indices;
                               for (const auto& m : self.missing) indices.push_back(m.index);
                               return indices;
                             })
      .def_property_readonly("indices", [](const Batch& self) { return self.indices; })
      .def_property_readonly("complex", [](const Batch& self) { return self.complex; })
      .def_property_readonly("mixed", [](const Batch& self) { return self.mixed; })
      .def_property_readonly("declined", [](const Batch& self) { return self.declined; })
      .def_property_readonly("cohorts",
                             [](const Batch& self) {
                               std::vector<std::pair<double, bool>> list;
                               for (const Cohort& c : self.cohorts) list.emplace_back(c.step, c.fresh);
                               return list;
                             })
      .def_property_readonly("written", [](const Batch& self) {
        py::list list = to_list(self.params);
        for (PyObject* object : self.written) list.append(py::handle(object));
        return list;
      });

  add_tables(m);
  add_quantization(m);

  py::class_<Sharing>(m, "Sharing").def(py::init<>()).def("found", &Sharing::found, py::arg("batches"));
}

}  // namespace fused_opt
