"""Prelude: an inference server with hot-swappable soft prompts."""
