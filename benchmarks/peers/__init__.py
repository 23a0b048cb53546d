"""Other servers' sides of comparisons; each runs in an environment of its own."""
