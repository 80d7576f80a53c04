"""How many tokens a job trained on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Not known of the jobs so far: the results of those that succeeded tell."""
    op.add_column("jobs", sa.Column("trained_tokens", sa.BigInteger))
