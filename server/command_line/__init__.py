"""What the commands of this machine are made of: flags from the settings, and ``prelude store``."""
