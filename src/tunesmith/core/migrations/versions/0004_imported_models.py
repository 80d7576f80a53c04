"""Models that no job of this server made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Every model so far has a job."""
    with op.batch_alter_table("models") as models:
        models.alter_column("job_id", existing_type=sa.String(), nullable=True)
