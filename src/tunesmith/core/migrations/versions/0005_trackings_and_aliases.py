"""Trackers that follow jobs, and names that answer with another model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Jobs so far are followed by no tracker, and models have one name."""
    op.create_table(
        "trackings",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_trackings_job_id"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_trackings"),
        sa.CheckConstraint("status IN ('waiting', 'following', 'ended', 'given up')", name="ck_trackings_status"),
    )
    op.create_index("ix_trackings_status", "trackings", ["status"])
    op.create_table(
        "aliases",
        sa.Column("organization_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_unix", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name="fk_aliases_organization_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_aliases_job_id"),
        sa.PrimaryKeyConstraint("organization_id", "name", name="pk_aliases"),
    )
    op.create_index("ix_aliases_job_id", "aliases", ["job_id"])
