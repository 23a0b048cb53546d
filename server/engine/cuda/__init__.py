"""What only GPUs use: Triton kernels and CUDA graphs."""
