"""Soft prompts on their way from the store to the engine."""
