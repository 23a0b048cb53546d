"""Completions and chat."""
