// Steps made by several threads at once, each with a team of threads, on parameters of their own and gradients that all of them share.
//
//   threads all        every kernel of every instruction set that this CPU has: the bits must be those of one thread
//   threads plain      the same for the scalar kernels alone
//   threads shared     planted fault: all callers step the same parameters
//   threads twice      planted fault: a step has one parameter twice, so that the threads of its team both write to it
//
// thread.sh builds it with ThreadSanitizer, which also reports races that did no harm this time. No Python, no torch.
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace {

using namespace fused_opt;

constexpr int kCallers = 3, kTeam = 2, kSteps = 2;

struct Form {
  Format format;
  int64_t gap = 0;  // elements between rows
  bool transposed = false;
};

struct Shape {
  int64_t rows, columns;
  Form param, grad, state;
};

// Without gap: updated in place. With one: through scratch memory. Of sizes such that a team's shares end inside tensors.
const std::vector<Shape> kShapes[kPrecisions] = {
    {
        {179, 211, {Format::kBFloat16}, {Format::kBFloat16}, {Format::kBFloat16}},
        {1, 5, {Format::kFloat32}, {Format::kFloat32}, {Format::kFloat32}},
        {7, 1009, {Format::kFloat32}, {Format::kFloat32}, {Format::kFloat32}},
        {3, 1009, {Format::kFloat16}, {Format::kFloat16}, {Format::kFloat16}},
        {181, 197, {Format::kBFloat16, 3}, {Format::kFloat16, 0, true}, {Format::kBFloat16}},
    },
    {
        {179, 211, {Format::kFloat64}, {Format::kFloat64}, {Format::kFloat64}},
        {181, 197, {Format::kFloat64, 1}, {Format::kFloat32, 0, true}, {Format::kFloat64, 0, true}},
    },
};

int bytes_of(Format format) { return kFormatBytes[static_cast<int>(format)]; }

// A matrix with values between 0.5 and 0.7 in it, and in its gaps.
struct Matrix {
  Format format;
  std::vector<int64_t> shape, strides;
  std::vector<char> bytes;

  Matrix(int64_t rows, int64_t columns, const Form& form)
      : format(form.format), shape{rows, columns}, strides{columns + form.gap, 1}, bytes(rows * (columns + form.gap) * bytes_of(format)) {
    if (form.transposed) strides = {1, rows};
    std::vector<double> values(bytes.size() / bytes_of(format));
    for (size_t i = 0; i < values.size(); ++i) values[i] = 0.5 + 0.2 * (i * 7919 % 1000) / 1000;
    const CodecsByFormat& codecs = isas[0].kernels->codecs[static_cast<int>(Precision::kDouble)];
    codecs.at[static_cast<int>(format)].encode(values.data(), bytes.data(), 1, static_cast<int64_t>(values.size()));
  }

  TensorInfo info() const {
    TensorInfo t;
    t.data = const_cast<char*>(bytes.data());
    t.shape = shape.data();
    t.strides = strides.data();
    t.ndim = 2;
    t.kind = format == Format::kBFloat16 ? 'b' : 'f';
    t.bits = static_cast<uint8_t>(8 * bytes_of(format));
    return t;
  }
};

using Grads = std::vector<Matrix>;

Grads make_grads(Precision precision) {
  Grads grads;
  for (const Shape& s : kShapes[static_cast<int>(precision)]) grads.emplace_back(s.rows, s.columns, s.grad);
  return grads;
}

// One caller's parameters and states, and the tasks that update them.
class Problem {
 public:
  Problem(Precision precision, const Grads& grads) : precision_(precision) {
    const std::vector<Shape>& shapes = kShapes[static_cast<int>(precision)];
    for (const Shape& s : shapes)
      for (size_t k = 0; k < kOwn; ++k) start_.emplace_back(s.rows, s.columns, k == 0 ? s.param : s.state);
    now_ = start_;
    operands_.reserve(shapes.size() * kAllOperands);  // pointers to them are kept, as to the walks
    walks_.reserve(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      const Matrix* const own = &now_[i * kOwn];
      const Matrix* const matrices[kMaxOperands] = {own, &grads[i], own + 1, own + 2, own + 3};
      TensorInfo infos[kMaxOperands];
      const TensorInfo* pointers[kMaxOperands];
      for (int k = 0; k < kMaxOperands; ++k) {
        infos[k] = matrices[k]->info();
        pointers[k] = &infos[k];
        operands_.push_back({infos[k].data, matrices[k]->format, nullptr});
      }
      operands_.resize((i + 1) * kAllOperands);  // no stage's
      walks_.emplace_back(pointers, kMaxOperands, kParam);
      Task task = {};
      task.walk = shapes[i].param.gap == 0 ? nullptr : &walks_[i];
      task.format = task.walk == nullptr ? own->format : precision == Precision::kSingle ? Format::kFloat32 : Format::kFloat64;
      task.operands = &operands_[i * kAllOperands];
      task.count = shapes[i].rows * shapes[i].columns;
      tasks_.push_back(task);
    }
  }
  Problem(const Problem&) = delete;

  void list_one_twice() { tasks_ = {tasks_[0], tasks_[0]}; }

  // Back to the start, and to be stepped by the kernels of a rule with certain flags.
  void prepare(const KernelTable& table, const KernelsByFormat& kernels) {
    static constexpr double kScalars[] = {1, 0.01, 0.99, 0.4, 0.6, 0.3, 0.2, 0.1, 0.05};  // enough of them for any rule
    static_assert(std::size(kScalars) >= std::max({+adam::kScalars, +rmsprop::kScalars, +sgd::kScalars}));
    for (size_t i = 0; i < now_.size(); ++i) memcpy(now_[i].bytes.data(), start_[i].bytes.data(), start_[i].bytes.size());
    for (Task& task : tasks_) {
      task.kernel = kernels.at[static_cast<int>(task.format)];
      task.scalars = kScalars;
      task.codecs = &table.codecs[static_cast<int>(precision_)];
    }
  }

  int step(int threads) { return run_parallel(tasks_, threads); }

  size_t hash() const {
    std::string all;
    for (const Matrix& m : now_) all.append(m.bytes.begin(), m.bytes.end());
    return std::hash<std::string>()(all);
  }

 private:
  static constexpr size_t kOwn = 1 + kMaxStates;  // a parameter and its states
  const Precision precision_;
  std::vector<Matrix> start_, now_;
  std::vector<Operand> operands_;
  std::vector<Walk> walks_;
  std::vector<Task> tasks_;
};

struct Rule {
  const KernelsByFormat* KernelTable::* kernels;
  unsigned flag_combinations;
} constexpr kRules[] = {
    {&KernelTable::adam, adam::kFlagCombinations},
    {&KernelTable::rmsprop, rmsprop::kFlagCombinations},
    {&KernelTable::sgd, sgd::kFlagCombinations},
};

// A hash of what each kernel left in memory.
struct Outcome {
  std::vector<size_t> hashes;
  bool threads_as_asked = true;
};

Outcome run_every_kernel(Problem& problem, int threads, int isas_used) {
  Outcome outcome;
  for (int i = 0; i < isas_used; ++i)
    for (const Rule& rule : kRules)
      for (unsigned flags = 0; flags < rule.flag_combinations && isas[i].supported(); ++flags) {
        problem.prepare(*isas[i].kernels, (isas[i].kernels->*rule.kernels)[flags]);
        for (int step = 0; step < kSteps; ++step) outcome.threads_as_asked &= problem.step(threads) == threads;
        outcome.hashes.push_back(problem.hash());
      }
  return outcome;
}

// In `kCallers` threads at once.
void call_together(const std::function<void(int caller)>& f) {
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c) callers.emplace_back(f, c);
  for (std::thread& caller : callers) caller.join();
}

bool bits_are_those_of_one_thread(Precision precision, int isas_used) {
  const Grads grads = make_grads(precision);
  Outcome outcomes[kCallers];
  call_together([&](int caller) {
    Problem problem(precision, grads);
    outcomes[caller] = run_every_kernel(problem, kTeam, isas_used);
  });
  Problem problem(precision, grads);
  const std::vector<size_t> expected = run_every_kernel(problem, 1, isas_used).hashes;
  int differing = 0;
  for (const Outcome& outcome : outcomes) {
    if (!outcome.threads_as_asked) return printf("a step did not run on %d threads\n", kTeam), false;
    for (size_t i = 0; i < expected.size(); ++i) differing += outcome.hashes[i] != expected[i];
  }
  printf("%d callers x %d threads, %zu kernels, precision %d: %d results differ from those of one thread\n", kCallers, kTeam,
         expected.size(), static_cast<int>(precision), differing);
  return differing == 0;
}

void plant(const std::string& fault) {
  const Grads grads = make_grads(Precision::kSingle);
  Problem problem(Precision::kSingle, grads);
  if (fault == "twice") problem.list_one_twice();
  problem.prepare(*isas[0].kernels, isas[0].kernels->adam[0]);
  const auto step = [&](int) { problem.step(kTeam); };
  if (fault == "twice")
    step(0);
  else
    call_together(step);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc == 2 ? argv[1] : "";
  if (mode == "shared" || mode == "twice") {
    plant(mode);
    return 0;
  }
  if (mode != "all" && mode != "plain") {
    fprintf(stderr, "usage: %s all|plain|shared|twice\n", argv[0]);
    return 2;
  }
  bool good = true;
  for (const Precision precision : {Precision::kSingle, Precision::kDouble})
    good &= bits_are_those_of_one_thread(precision, mode == "plain" ? 1 : isa_count);
  return good ? 0 : 1;
}
