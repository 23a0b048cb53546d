"""Evaluations that the server keeps: answers that a client sends, or rows that are answered here."""
