"""What only CPUs use: Numba, LLVM and oneDNN."""
