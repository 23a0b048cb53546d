"""Conversion of soft prompts of other programs to PEFT directories. Offline; no pickle is ever executed."""
