"""CPU kernels: Numba, LLVM and oneDNN."""
