"""Models: what can be called by name. Bases come from the catalogue, tuned models are rows with an adapter folder.

What was trained, an adapter or all weights, is copied to `<home>/adapters/<model id>` before its row is written and
removed after its row is gone, so a row always has its folder; what a crash leaves in between, `sweep` removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core import names
from tunesmith.core.accounts import Caller, Role
from tunesmith.core.aliases import Alias, drop_alias, find_alias, list_aliases, take_alias
from tunesmith.core.bases import Base, Bases
from tunesmith.core.blobs import full_disk_is_storage_full, read_chunks, write_durably
from tunesmith.core.requests import check_suffix
from tunesmith.core.schema import jobs, models, organizations
from tunesmith.core.statuses import LIVE
from tunesmith.core.store import Store
from tunesmith.errors import InvalidRequest, NotFound, PermissionDenied
from tunesmith.rundir import Snapshot, holds_all_weights, sync_folder

BASE_OWNER = "tunesmith"
SWEEP_AFTER_S = 3_600
"""An adapter folder without a row younger than this may be about to get one."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as clients see it, and where its adapter is."""

    name: str
    created_unix: int
    owned_by: str
    base_name: str
    """The base at the root of its lineage; its own name for a base."""
    parent_name: str | None
    """What it was trained from; None for a base."""
    organization_id: str | None
    """None for a base: everybody's."""
    adapter_dir: Path | None
    """What was trained: an adapter, or all weights. None for a base."""
    method: Literal["lora", "full"] | None = None
    """Which of the two; None for a base."""
    note: str | None = None
    """One line for people: what stands behind a base or an alias."""
    step: int | None = None
    """Of the epoch that a checkpoint is; None for what a job gave in the end, and for a base."""
    metrics: Mapping[str, float] | None = None
    """Numbers of that epoch."""
    alias: Alias | None = None
    """What the name stands for, where it is another name of a model."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """What an engine needs to run a model."""

    name: str
    base_name: str
    base_dir: Path
    adapter_dir: Path | None
    """An adapter, or all weights: engines tell by what is in it. None for a base."""
    context_tokens: int
    """Prompt and completion together: one more than a training example may have, as the last is never fed back."""


class Models:
    """The models of all organisations."""

    def __init__(self, store: Store, bases: Bases, home: Path) -> None:
        self._store = store
        self._bases = bases
        self._adapters = home / "adapters"

    def get(self, caller: Caller, name: str) -> Model:
        """Raises NotFound (code `model_not_found`) for a name that is unknown or another organisation's."""
        with self._store.reading() as connection:
            alias = find_alias(connection, caller.organization_id, name)
            return self.find(connection, caller.organization_id, name) if alias is None else _alias_model(alias)

    def resolve(self, caller: Caller, name: str) -> ModelRef:
        """What to run for `name`. Raises NotFound, also where the base of a tuned model is not here."""
        return self.resolve_in(caller.organization_id, name)

    def resolve_in(self, organization_id: str, name: str) -> ModelRef:
        """As `resolve`, for work on behalf of an organisation, such as its jobs."""
        with self._store.reading() as connection:
            model = self.find(connection, organization_id, name)
        return ModelRef(
            name=model.name,
            base_name=model.base_name,
            base_dir=self._bases.folder(model.base_name),
            adapter_dir=model.adapter_dir,
            context_tokens=self._bases.get(model.base_name).context_tokens + 1,
        )

    def delete(self, caller: Caller, name: str) -> None:
        """Remove a tuned model, and with what a job gave in the end its checkpoints: rows, then adapters.

        Of an alias only the name goes; the model that it means stays.
        A checkpoint may be removed by itself. Jobs keep the name of their model; models trained on from a removed one
        live on.

        Raises NotFound; PermissionDenied for a base or for a key that is no owner's; InvalidRequest while a job that
        has not ended is to train on from it.
        """
        with self._store.transaction() as connection:
            alias = find_alias(connection, caller.organization_id, name)
            if alias is not None:
                _check_owner(caller, name)
                drop_alias(connection, caller.organization_id, name)
                return
            model = self.find(connection, caller.organization_id, name)
            if model.adapter_dir is None:
                raise PermissionDenied(f"{name} is a base model and cannot be deleted.", param="model")
            _check_owner(caller, name)
            row = connection.execute(select(models).where(models.c.name == name)).one()
            going = [row]
            if row.step is None:
                going += connection.execute(select(models).where(*_is_checkpoint_of(row.job_id)))
            going_names = [one.name for one in going]
            needing = select(jobs.c.id, jobs.c.status, jobs.c.parent_name).where(
                jobs.c.parent_name.in_(going_names), jobs.c.status.in_(LIVE)
            )
            job = connection.execute(needing).first()
            if job is not None:
                raise InvalidRequest(
                    f"{job.parent_name} is needed by fine-tune {job.id}, which is {job.status}. Wait until it has "
                    "ended, or cancel it first.",
                    param="model",
                )
            connection.execute(delete(models).where(models.c.name.in_(going_names)))
        for one in going:
            _remove(self._adapters / one.id)

    def find(self, connection: Connection, organization_id: str, name: str) -> Model:
        """As `get`, within a transaction."""
        try:
            return _base_model(self._bases.get(name))
        except KeyError:
            row = connection.execute(_tuned(organization_id).where(models.c.name == name)).one_or_none()
        if row is not None:
            return self._model(row)
        alias = find_alias(connection, organization_id, name)
        if alias is None:
            raise NotFound(
                f"The model `{name}` does not exist. GET /v1/models lists those that do.",
                param="model",
                code="model_not_found",
            )
        if alias.model_name is None:
            raise alias.not_yet()
        return self.find(connection, organization_id, alias.model_name)

    def take_alias(self, connection: Connection, organization_id: str, name: str, job_id: str) -> None:
        """Let `name` mean the model of a job, within a writing transaction. Raises InvalidRequest if it is taken."""
        try:
            if self.find(connection, organization_id, name).name == name:
                raise InvalidRequest(
                    f"alias {name!r} is the name of a model here already. Choose another.", param="alias"
                )
        except NotFound:
            pass  # as it should be
        take_alias(connection, organization_id, name, job_id, int(self._store.clock()))

    def folder(self, model_id: str) -> Path:
        """Where a tuned model lies."""
        return self._adapters / model_id

    def keep(self, adapter_dir: Path) -> str:
        """Copy a finished adapter to where models live; return the new model's id. `insert` or `discard` comes next.

        Durable before it returns. Raises StorageFull: then nothing is left.
        """
        model_id = self._store.new_id("model-")
        folder = self.folder(model_id)
        with full_disk_is_storage_full():
            folder.mkdir(parents=True)
        try:
            for source in sorted(adapter_dir.iterdir()):
                write_durably(folder / source.name, read_chunks(source))
            sync_folder(self._adapters)
        except BaseException:
            _remove(folder)
            raise
        return model_id

    def adopt(self, caller: Caller, folder: Path, base_name: str, suffix: str | None) -> Model:
        """Make a model of weights that no job here made. An engine has found that they fit the base.

        Raises InvalidRequest for the suffix, StorageFull.
        """
        check_suffix(suffix)
        model_id = self.keep(folder)
        try:
            with self._store.transaction() as connection:
                name = self.insert(
                    connection,
                    model_id,
                    organization_id=caller.organization_id,
                    job_id=None,
                    base_name=base_name,
                    parent_name=None,
                    suffix=suffix,
                )
                return self.find(connection, caller.organization_id, name)
        except SQLAlchemyError:
            raise  # whether the commit took place is not known: `sweep` finds out
        except BaseException:
            self.discard(model_id)
            raise

    def insert(
        self,
        connection: Connection,
        model_id: str,
        *,
        organization_id: str,
        job_id: str | None,
        base_name: str,
        parent_name: str | None,
        suffix: str | None,
    ) -> str:
        """Make a model of an adapter that `keep` copied, within a writing transaction; return its name.

        `parent_name` is None for a model trained from its base.
        """
        now = int(self._store.clock())
        name = self.fine_tuned_name(connection, organization_id, base_name, suffix, now)
        connection.execute(
            insert(models).values(
                id=model_id,
                name=name,
                organization_id=organization_id,
                base_name=base_name,
                parent_name=parent_name,
                job_id=job_id,
                created_unix=now,
            )
        )
        return name

    def insert_checkpoint(self, connection: Connection, model_id: str, *, of: str, snapshot: Snapshot) -> None:
        """Make a model of an epoch's adapter that `keep` copied: a checkpoint of the model `of`, with its lineage."""
        final = connection.execute(select(models).where(models.c.name == of)).one()
        values = final._asdict() | {
            "id": model_id,
            "name": names.checkpoint_name(of, snapshot.step),
            "step": snapshot.step,
            "metrics": snapshot.metrics,
        }
        del values["position"]
        connection.execute(insert(models).values(values))

    def checkpoints(self, connection: Connection, job_id: str) -> list[Model]:
        """The checkpoints of a job that were not deleted, newest first."""
        query = select(models, organizations.c.slug).join(organizations).where(*_is_checkpoint_of(job_id))
        return [self._model(row) for row in connection.execute(query.order_by(models.c.step.desc()))]

    def fine_tuned_name(
        self, connection: Connection, organization_id: str, base_name: str, suffix: str | None, at_unix: int
    ) -> str:
        """A free name for a model made at `at_unix`; a second later for each that is taken by a model or a job."""
        slug = connection.scalars(select(organizations.c.slug).where(organizations.c.id == organization_id)).one()
        while True:
            name = names.fine_tuned_name(base_name, slug, suffix, at_unix)
            taken = select(models.c.id).where(models.c.name == name)
            once = select(jobs.c.id).where(jobs.c.fine_tuned_model == name)  # a deleted model's name is not given again
            if connection.execute(taken.union_all(once)).first() is None:
                return name
            at_unix += 1

    def discard(self, model_id: str) -> None:
        """Remove an adapter that `keep` copied and `insert` did not take up. Idempotent."""
        _remove(self._adapters / model_id)

    def sweep(self) -> int:
        """Remove adapters that no model owns, left by a process that died between two steps; return how many."""
        if not self._adapters.is_dir():
            return 0
        before_unix = self._store.clock() - SWEEP_AFTER_S
        old = [folder for folder in self._adapters.iterdir() if folder.stat().st_mtime < before_unix]
        with self._store.reading() as connection:
            owned = set(connection.scalars(select(models.c.id)))
        orphans = [folder for folder in old if folder.name not in owned]
        for folder in orphans:
            _remove(folder)
        return len(orphans)

    def list(self, caller: Caller) -> list[Model]:
        """Every base, then the organisation's tuned models, oldest first, then its aliases."""
        with self._store.reading() as connection:
            rows = connection.execute(_tuned(caller.organization_id).order_by(models.c.position)).all()
            aliases = [_alias_model(alias) for alias in list_aliases(connection, caller.organization_id)]
        return [_base_model(base) for base in self._bases.list()] + [self._model(row) for row in rows] + aliases

    def _model(self, row: Row[Any]) -> Model:
        folder = self._adapters / row.id
        return Model(
            name=row.name,
            created_unix=row.created_unix,
            owned_by=row.slug,
            base_name=row.base_name,
            parent_name=row.parent_name or row.base_name,
            organization_id=row.organization_id,
            adapter_dir=folder,
            method="full" if holds_all_weights(folder) else "lora",
            step=row.step,
            metrics=row.metrics,
        )


def _base_model(base: Base) -> Model:
    return Model(
        name=base.name,
        created_unix=base.created_unix,
        owned_by=BASE_OWNER,
        base_name=base.name,
        parent_name=None,
        organization_id=None,
        adapter_dir=None,
        note=base.note,
    )


def _alias_model(alias: Alias) -> Model:
    return Model(
        name=alias.name,
        created_unix=alias.created_unix,
        owned_by=alias.owned_by,
        base_name=alias.base_name,
        parent_name=alias.model_name or alias.base_name,
        organization_id=alias.organization_id,
        adapter_dir=None,
        note=alias.note,
        alias=alias,
    )


def _check_owner(caller: Caller, name: str) -> None:
    if caller.role is not Role.OWNER:
        raise PermissionDenied(
            f"Deleting {name} needs an API key with role owner; this key has role member. Ask an owner.",
            param="model",
        )


def _tuned(organization_id: str) -> Select[Any]:
    return select(models, organizations.c.slug).join(organizations).where(models.c.organization_id == organization_id)


def _is_checkpoint_of(job_id: str) -> tuple[ColumnElement[bool], ...]:
    return models.c.job_id == job_id, models.c.step.is_not(None)


def _remove(folder: Path) -> None:
    # Renamed first: whoever looks for the adapter finds it whole or not at all.
    trash = folder.with_name(folder.name + ".trash")
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash)
