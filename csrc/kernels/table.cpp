// Compiled once per ISA, each time with its own flags and FUSED_OPT_ISA: instantiates every rule x flags x dtype and lists them.
#include <utility>  // integer_sequence: a type, no code

#include "codec.h"
#include "driver.h"
#include "rules.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

template <template <class, unsigned> class Rule, class Flags>
struct Kernels;

// Indexed by flags.
template <template <class, unsigned> class Rule, unsigned... kFlags>
struct Kernels<Rule, std::integer_sequence<unsigned, kFlags...>> {
  static constexpr KernelsByDtype list[] = {{{update<Rule<float, kFlags>, Plain<float>>, update<Rule<double, kFlags>, Plain<double>>}}...};
};

template <template <class, unsigned> class Rule, unsigned kFlagCombinations>
constexpr const KernelsByDtype* kernels = Kernels<Rule, std::make_integer_sequence<unsigned, kFlagCombinations>>::list;

}  // namespace

#define FUSED_OPT_QUOTE(x) #x
#define FUSED_OPT_NAME(x) FUSED_OPT_QUOTE(x)

extern const KernelTable kernel_table;
const KernelTable kernel_table = {FUSED_OPT_NAME(FUSED_OPT_ISA), kernels<Adam, adam::kFlagCombinations>,
                                  kernels<RMSprop, rmsprop::kFlagCombinations>, kernels<SGD, sgd::kFlagCombinations>};

}  // namespace fused_opt::FUSED_OPT_ISA
