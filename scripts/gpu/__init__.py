"""Judges the GPU path on a machine with a GPU, and rehearses that without one."""
