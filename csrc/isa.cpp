#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_opt {

#define FUSED_OPT_DECLARE(isa)           \
  namespace isa {                        \
  extern const KernelTable kernel_table; \
  }

FUSED_OPT_DECLARE(scalar)
#if defined(__x86_64__)
FUSED_OPT_DECLARE(avx2)
FUSED_OPT_DECLARE(avx512)
#endif

#if defined(__x86_64__)
namespace {

// Not __builtin_cpu_supports("f16c"), which Clang 14 does not know. Asked once: under a hypervisor CPUID takes 15 us.
const bool has_f16c = [] {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}();

}  // namespace
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
const Isa isas[] = {
    {"scalar", &scalar::kernel_table, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kernel_table, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c; }},
    {"avx512", &avx512::kernel_table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq");
     }},
#endif
};
const int isa_count = sizeof(isas) / sizeof(isas[0]);

}  // namespace fused_opt
