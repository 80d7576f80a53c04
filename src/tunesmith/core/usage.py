"""Tokens trained and served, per key, model and day. Knows no prices yet and refuses nobody."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from tunesmith.core.accounts import Caller
from tunesmith.core.schema import api_keys, usage
from tunesmith.core.store import Store

DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one key used of one model on one day."""

    key_id: str
    model: str
    day: int
    """Days since 1970-01-01, UTC."""
    trained_tokens: int
    prompt_tokens: int
    completion_tokens: int


class Ledger:
    """The usage of all keys."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def record(
        self,
        connection: Connection,
        key_id: str,
        model: str,
        *,
        trained_tokens: int = 0,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Add to today's row, within a writing transaction."""
        day = int(self._store.clock() // DAY_S)
        added = {
            "trained_tokens": trained_tokens,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        changed = connection.execute(
            update(usage)
            .where(usage.c.key_id == key_id, usage.c.model == model, usage.c.day == day)
            .values({name: usage.c[name] + tokens for name, tokens in added.items()})
        ).rowcount
        if not changed:
            connection.execute(insert(usage).values(key_id=key_id, model=model, day=day, **added))

    def list(self, caller: Caller) -> list[UsageRow]:
        """Everything the caller's organisation used, oldest day first."""
        query = (
            select(usage)
            .join(api_keys)
            .where(api_keys.c.organization_id == caller.organization_id)
            .order_by(usage.c.day, usage.c.key_id, usage.c.model)
        )
        with self._store.reading() as connection:
            return [UsageRow(**row._mapping) for row in connection.execute(query)]
