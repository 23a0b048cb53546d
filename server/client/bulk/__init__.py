"""Bulk inference: the rows of a file through a running server, in order, every row once."""
