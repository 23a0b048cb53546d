"""Parts of ``benchmarks.cluster_simulation``."""
