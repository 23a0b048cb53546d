"""``prelude eval``: score soft prompts of a running server on labelled examples."""
