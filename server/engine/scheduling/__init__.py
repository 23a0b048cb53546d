"""Scheduling: which sequences the next step computes. Pure logic, without torch."""
