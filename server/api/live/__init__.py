"""The running batch for people who watch it: its names, and what a tenant sees of it."""
