"""Bytes, connections and browsers: checks before a request reaches the API."""
