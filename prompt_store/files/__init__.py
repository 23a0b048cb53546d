"""PEFT's files, read without trusting them."""
