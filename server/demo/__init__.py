"""The embedded default: a small model, its soft prompts, and the tour that shows them."""
