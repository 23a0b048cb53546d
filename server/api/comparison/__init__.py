"""Comparison of two versions of soft prompts."""
