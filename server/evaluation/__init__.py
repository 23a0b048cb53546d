"""Scores of labelled examples, and the significance of their difference; for the server and its clients."""
