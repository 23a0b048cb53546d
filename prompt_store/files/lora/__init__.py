"""LoRA and IA3 files: what they adapt, and whether the base can serve it."""
