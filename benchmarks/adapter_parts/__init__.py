"""The parts of ``benchmarks.adapters``."""
