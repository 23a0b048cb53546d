"""Evaluations and training runs, which the catalog keeps beside the soft prompts."""
