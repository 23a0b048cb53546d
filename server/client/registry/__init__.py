"""Commands that correct, audit, prune and move soft prompts."""
