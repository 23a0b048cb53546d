"""The batching engine: scheduling, key/value blocks, the model's forward pass, and its process."""
