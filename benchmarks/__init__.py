"""Benchmarks of Prelude; each compares alternatives side by side in one run."""
