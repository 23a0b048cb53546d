"""The life of a request that the engine answers."""
