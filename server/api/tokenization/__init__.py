"""Tokenizer routes."""
