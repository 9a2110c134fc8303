"""Triton kernels. Empty in this version: the GPU backend is not written yet."""
