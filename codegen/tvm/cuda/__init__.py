"""Kernels for NVIDIA GPUs: TIR functions with blocks and threads, printed as CUDA C++ by TVM."""
