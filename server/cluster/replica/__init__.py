"""One replica: a server process, and what its actor knows of it. No Ray in here."""
