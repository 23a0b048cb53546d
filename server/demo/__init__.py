"""The embedded model, its soft prompts, and the tour of ``prelude demo``."""
