"""Inject faults into a whole server under load, and check its invariants. Each module is a script."""
