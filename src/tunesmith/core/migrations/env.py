"""How Alembic runs our revisions: on the connection `Store.migrate` gives, inside its transaction."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection)
context.run_migrations()
