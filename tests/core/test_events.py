from __future__ import annotations

import pytest

from tests.core.conftest import START_UNIX, World
from tunesmith.core.events import Event


def test_ids_are_dense_within_a_job_and_readers_go_on_after_one(world: World) -> None:
    one, other = world.job(), world.job()
    for number, job in enumerate((one, other, one, one)):
        world.clock.now += 1
        with world.store.transaction() as connection:
            world.events.append(connection, job.id, "warn", f"event {number}", {"number": number})
    assert [event.id for event in world.events.list(one.id)] == [1, 2, 3, 4]
    assert [event.id for event in world.events.list(other.id)] == [1, 2]
    assert world.events.list(one.id, after=3) == [Event(4, START_UNIX + 4, "warn", "event 3", {"number": 3})]
    assert world.events.list(one.id, after=4) == []
    assert world.events.list("ft-none") == []


def test_an_event_of_a_transaction_that_fails_never_was(world: World) -> None:
    job = world.job()
    with pytest.raises(KeyError), world.store.transaction() as connection:
        world.events.append(connection, job.id, "info", "not true")
        raise KeyError
    with world.store.transaction() as connection:
        world.events.append(connection, job.id, "info", "true")
    assert [(event.id, event.message) for event in world.events.list(job.id)][1:] == [(2, "true")]
