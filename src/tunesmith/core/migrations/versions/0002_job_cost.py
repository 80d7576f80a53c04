"""What a job costs, by the price of its base."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Bases had no price before: every job so far cost nothing."""
    op.add_column("jobs", sa.Column("cost_usd", sa.Double(), nullable=False, server_default="0"))
