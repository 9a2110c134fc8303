// Codecs: how a stored value becomes the number a rule computes with, and back. A codec knows no optimizer.
#pragma once

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Stored as it is computed: fp32 and fp64.
template <class T>
struct Plain {
  using Stored = T;
  static T decode(Stored x) { return x; }
  static Stored encode(T x) { return x; }
};

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
