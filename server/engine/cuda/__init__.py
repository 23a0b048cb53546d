"""What only GPUs use: Triton kernels."""
