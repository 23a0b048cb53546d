"""The frozen model, and what is computed with it."""
