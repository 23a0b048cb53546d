"""Constraints on generated text: schemas, grammars, choices and patterns."""
