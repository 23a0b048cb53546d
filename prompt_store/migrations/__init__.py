"""Alembic's migrations of the catalog; ``prompt_store.database`` runs them when a store is opened."""
