"""Kernels: Triton for GPUs, C for the rows of the CPU. Imported only when an implementation is first called."""
