"""Many replicas of a server."""
