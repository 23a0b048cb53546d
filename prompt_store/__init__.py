"""Soft prompts and their storage."""
