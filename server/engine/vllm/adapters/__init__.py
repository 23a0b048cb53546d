"""Adapters of the registry under vLLM: which it holds, their files, and the modules that they can change."""
