"""What the comparisons run in other processes, and how they talk to it."""
