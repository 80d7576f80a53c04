"""Jobs that pause and tell their times, epochs that are models of their own, events that are metrics."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Nothing was paused or kept before, and all events were messages."""
    for name in ("paused_unix", "started_unix", "finished_unix"):
        op.add_column("jobs", sa.Column(name, sa.BigInteger()))
    op.add_column("models", sa.Column("step", sa.BigInteger()))
    op.add_column("models", sa.Column("metrics", sa.JSON()))
    op.add_column("events", sa.Column("kind", sa.String(), nullable=False, server_default="message"))
