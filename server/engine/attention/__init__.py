"""Paged attention and its cache: what every device shares."""
