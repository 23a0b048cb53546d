"""GPU kernels: Triton and CUDA graphs."""
