"""Who calls, with which scopes and limits."""
