"""How the embedded demo model and its soft prompts are made."""
