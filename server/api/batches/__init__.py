"""OpenAI's files and batches: JSON Lines of requests, answered in the service tier ``batch``."""
