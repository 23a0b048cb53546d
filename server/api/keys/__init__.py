"""API keys with their tenants, scopes and limits."""
