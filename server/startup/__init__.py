"""What happens between the command and the first request: the engine's process, its stages, and what is served."""
