"""Scripts that the comparisons run in separate environments."""
