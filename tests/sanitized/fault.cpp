// Linked into the extension by a build with sanitizers, and by no other: undefined for any `places` above 30. See planted_faults.py.
extern "C" __attribute__((visibility("default"))) int fused_opt_shift(int places) { return 1 << places; }
