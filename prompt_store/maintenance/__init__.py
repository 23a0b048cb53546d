"""Backup, restoration and verification of a whole store."""
