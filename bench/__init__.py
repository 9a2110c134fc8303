"""Benchmarks, parity checks and the demo: what `fused-opt` runs."""
