"""Alembic's migrations of the catalog; ``prompt_store.catalog.database`` runs them when a store is opened."""
