"""Triton kernels. Imported only where a GPU, or Triton's interpreter, is used."""
