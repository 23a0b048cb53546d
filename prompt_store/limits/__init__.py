"""What servers of one catalog have used of the limits of API keys."""
