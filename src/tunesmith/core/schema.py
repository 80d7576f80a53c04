"""The tables, on one page. Knows columns and constraints; the rules and the SQL are with each noun.

Every change here comes with a new revision under `migrations/versions`; a test compares the two.
`position` orders rows as they were made; `id` is what clients see.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

organizations = Table(
    "organizations",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("title", String, nullable=False),
    Column("slug", String, nullable=False, unique=True),  # stands in model names, which are unique
    Column("created_unix", BigInteger, nullable=False),
    Column("last_turn", BigInteger, nullable=False),  # 0, then grows with every pending job of theirs that starts
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("organization_id", ForeignKey("organizations.id"), nullable=False),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("secret_sha256", String, nullable=False, unique=True),
    Column("hint", String, nullable=False),
    Column("created_unix", BigInteger, nullable=False),
    Column("revoked_unix", BigInteger),
)

files = Table(
    "files",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("organization_id", ForeignKey("organizations.id"), nullable=False, index=True),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    Column("status_details", String),
    Column("created_unix", BigInteger, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),  # names the adapter's folder, never shown
    Column("name", String, nullable=False, unique=True),
    Column("organization_id", ForeignKey("organizations.id"), nullable=False, index=True),
    Column("base_name", String, nullable=False),
    Column("parent_name", String),
    Column("job_id", ForeignKey("jobs.id"), index=True),  # null for one that was imported
    Column("created_unix", BigInteger, nullable=False),
    Column("step", BigInteger),  # of the epoch that a checkpoint is; null for what a job gave in the end
    Column("metrics", JSON(none_as_null=True)),  # of that epoch
)

jobs = Table(
    "jobs",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("organization_id", ForeignKey("organizations.id"), nullable=False, index=True),
    Column("key_id", ForeignKey("api_keys.id"), nullable=False),
    Column("model", String, nullable=False),
    Column("base_name", String, nullable=False),
    Column("parent_name", String),
    Column("status", String, nullable=False, index=True),
    Column("created_unix", BigInteger, nullable=False),
    Column("updated_unix", BigInteger, nullable=False),
    Column("asked", JSON, nullable=False),
    Column("hyperparameters", JSON(none_as_null=True)),
    Column("training_file_id", ForeignKey("files.id"), nullable=False),
    Column("validation_file_id", ForeignKey("files.id")),
    Column("result_file_id", ForeignKey("files.id")),
    Column("training_examples", BigInteger, nullable=False),
    Column("cost_usd", Double, nullable=False, server_default="0"),
    Column("seed", BigInteger, nullable=False),
    Column("fine_tuned_model", String),  # keeps its value when the model is deleted
    Column("error", String),
    Column("queue_number", Integer),  # as last announced
    Column("paused_unix", BigInteger),  # null: not paused
    Column("started_unix", BigInteger),
    Column("finished_unix", BigInteger),
    Column("trained_tokens", BigInteger),  # null until it has succeeded
    Column("lease", BigInteger, nullable=False),  # fencing token: 0, then grows with every claim
    Column("lease_holder", String),
    Column("lease_expires_unix", Double),
    Column("run_id", String),
    Column("handle", String),
    Column("progress_seq", BigInteger, nullable=False),  # the trainer's lines up to here are events already
    CheckConstraint("status IN ('pending', 'running', 'succeeded', 'failed', 'cancelled')", name="status"),
    CheckConstraint("lease_holder IS NULL OR status = 'running'", name="lease"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("created_unix", BigInteger, nullable=False),
    Column("level", String, nullable=False),
    Column("message", String, nullable=False),
    Column("kind", String, nullable=False, server_default="message"),
    Column("data", JSON(none_as_null=True)),
)

trackings = Table(
    "trackings",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # its place among the job's integrations
    Column("status", String, nullable=False, index=True),
    Column("failures", Integer, nullable=False),
    CheckConstraint("status IN ('waiting', 'following', 'ended', 'given up')", name="status"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("organization_id", ForeignKey("organizations.id"), primary_key=True),
    Column("name", String, primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False, index=True),  # its model answers to the name
    Column("created_unix", BigInteger, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("key_id", ForeignKey("api_keys.id"), primary_key=True),
    Column("model", String, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),  # days since 1970-01-01, UTC
    Column("trained_tokens", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
)
