"""Bytes, connections and browsers: what a request has to be before it is one of the API's."""
