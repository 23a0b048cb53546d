"""The stages that build the embedded demo model and its soft prompts."""
