"""Faults done to a whole server under load, with what has to hold all the same. Each module runs by itself."""
