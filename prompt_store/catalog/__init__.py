"""Names, versions, aliases and history, in SQLite or PostgreSQL."""
