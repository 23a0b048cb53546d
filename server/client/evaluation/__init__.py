"""Scores of soft prompts on labelled examples, by asking a running server."""
