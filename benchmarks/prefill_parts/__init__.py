"""The parts of ``benchmarks.prefill``."""
