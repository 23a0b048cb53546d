"""What an answer is held to: schemas, grammars, choices, patterns."""
