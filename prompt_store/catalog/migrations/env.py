"""Runs the migrations over the connection that ``prompt_store.catalog.database`` hands in."""

from __future__ import annotations

from alembic import context

from prompt_store.catalog.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
