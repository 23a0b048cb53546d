"""Soft prompts between the store and the engine."""
