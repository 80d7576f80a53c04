from __future__ import annotations

from tests.core.conftest import START_UNIX, World
from tests.core.test_models import tune
from tunesmith.core.usage import DAY_S, Ledger, UsageRow

TODAY = START_UNIX // DAY_S


def test_tokens_add_up_per_key_model_and_day(world: World) -> None:
    ledger = Ledger(world.store)
    with world.store.transaction() as connection:
        ledger.record(connection, world.owner.key_id, "ada", prompt_tokens=3, completion_tokens=4)
        ledger.record(connection, world.owner.key_id, "ada", prompt_tokens=30, trained_tokens=5)
        ledger.record(connection, world.owner.key_id, "babbage", prompt_tokens=1)
        ledger.record(connection, world.stranger.key_id, "ada", prompt_tokens=7)
        world.clock.now += DAY_S
        ledger.record(connection, world.owner.key_id, "ada", completion_tokens=9)
    key = world.owner.key_id
    assert ledger.list(world.member) == [
        UsageRow(key, "ada", TODAY, trained_tokens=5, prompt_tokens=33, completion_tokens=4),
        UsageRow(key, "babbage", TODAY, trained_tokens=0, prompt_tokens=1, completion_tokens=0),
        UsageRow(key, "ada", TODAY + 1, trained_tokens=0, prompt_tokens=0, completion_tokens=9),
    ]


def test_a_fine_tune_counts_for_the_key_that_asked(world: World) -> None:
    model = tune(world, world.member)
    assert Ledger(world.store).list(world.owner) == [UsageRow(world.member.key_id, model.name, TODAY, 1, 0, 0)]
