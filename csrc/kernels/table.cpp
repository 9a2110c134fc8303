// Compiled once per ISA, each time with its own flags and FUSED_OPT_ISA: instantiates every rule x flags x format and every codec x
// precision, and lists them.
#include "blocks.h"
#include "codec.h"
#include "driver.h"
#include "rules.h"
#include "stages.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Centered RMSprop has none: its variance is the small difference of two states that are rounded by 3%.
template <class Rule>
constexpr bool takes_codes = Rule::kStates > 0;
template <unsigned kFlags>
constexpr bool takes_codes<RMSprop<float, kFlags>> = !RMSprop<float, kFlags>::centered;

template <class Rule, class Value, class ParamRounding = ToNearest>
constexpr Kernel blocks_kernel = [] {
  if constexpr (takes_codes<Rule>)
    return update_blocks<Rule, Value, ParamRounding>;
  else
    return nullptr;
}();

// Null where each fma is a call: a step takes so long there, 4 ns an element, that the stage adds little to it.
template <class Rule>
constexpr Kernel stochastic_kernel = kFastFma ? update_coded<Rule, BFloat16, Stochastically> : nullptr;
template <class Rule>
constexpr Kernel stochastic_blocks_kernel = kFastFma ? blocks_kernel<Rule, BFloat16, Stochastically> : nullptr;

template <template <class, unsigned> class Rule, class Flags>
struct Kernels;

// Indexed by flags.
template <template <class, unsigned> class Rule, unsigned... kFlags>
struct Kernels<Rule, std::integer_sequence<unsigned, kFlags...>> {
  // The members in the order of Format.
  static constexpr KernelsByFormat list[] = {{{update<Rule<float, kFlags>>, update<Rule<double, kFlags>>,
                                               update_coded<Rule<float, kFlags>, BFloat16>, update_coded<Rule<float, kFlags>, Float16>},
                                              {blocks_kernel<Rule<float, kFlags>, Plain<float>>, nullptr,
                                               blocks_kernel<Rule<float, kFlags>, BFloat16>, blocks_kernel<Rule<float, kFlags>, Float16>},
                                              stochastic_kernel<Rule<float, kFlags>>,
                                              stochastic_blocks_kernel<Rule<float, kFlags>>}...};
};

template <template <class, unsigned> class Rule, unsigned kFlagCombinations>
constexpr const KernelsByFormat* kernels = Kernels<Rule, std::make_integer_sequence<unsigned, kFlagCombinations>>::list;

// In the order of Format.
template <class Real>
constexpr CodecsByFormat codecs = {{kCodec<Real, Plain<float>>, kCodec<Real, Plain<double>>, kCodec<Real, BFloat16>, kCodec<Real, Float16>,
                                    kCodec<Real, Truth>, kCodec<Real, Short>}};

constexpr CodecsByFormat codecs_by_precision[] = {codecs<float>, codecs<double>};
constexpr StagesByPrecision stages_by_precision[] = {kStages<float>, kStages<double>};
constexpr Norms norms_by_precision[] = {kNorms<float>, kNorms<double>};

// In the order of Code.
constexpr BlockCodecs block_codecs = {
    {kBlockCodec<Linear>, kBlockCodec<MuLaw<true>>, kBlockCodec<MuLaw<false>>}, largest_magnitude, scale_of, rounding_of};

}  // namespace

#define FUSED_OPT_QUOTE(x) #x
#define FUSED_OPT_NAME(x) FUSED_OPT_QUOTE(x)

extern const KernelTable kernel_table;
const KernelTable kernel_table = {FUSED_OPT_NAME(FUSED_OPT_ISA),
                                  kernels<Adam, adam::kFlagCombinations>,
                                  kernels<RMSprop, rmsprop::kFlagCombinations>,
                                  kernels<SGD, sgd::kFlagCombinations>,
                                  codecs_by_precision,
                                  stages_by_precision,
                                  norms_by_precision,
                                  &block_codecs};

}  // namespace fused_opt::FUSED_OPT_ISA
