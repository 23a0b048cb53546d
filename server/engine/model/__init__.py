"""The frozen model and its computations."""
