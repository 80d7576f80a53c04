"""What the base of a job decides: its price, and whether the job can be made at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.core.conftest import World, rows
from tests.core.test_leases import claim, start, succeed
from tunesmith.core.bases import Bases
from tunesmith.core.jobs import Jobs
from tunesmith.core.models import Models
from tunesmith.errors import InvalidRequest, NotFound
from tunesmith.tokenizer import Tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def with_bases(world: World, catalogue: str) -> World:
    """The same platform after a restart with another catalogue."""
    (world.home / "bases.toml").write_text(catalogue.format(folder=world.home / "checkpoint"))
    bases = Bases(world.home)
    models = Models(world.store, bases, world.home)
    jobs = Jobs(world.store, world.files, models, bases, world.events)
    return dataclasses.replace(world, bases=bases, models=models, jobs=jobs)


def cost(world: World, **fields: object) -> str:
    job = world.job(**fields)  # type: ignore[arg-type]
    world.jobs.enqueue()
    (message,) = [message for message in world.messages(job.id) if message.startswith("Fine-tune costs")]
    return message


def test_a_job_costs_price_times_tokens_times_epochs(world: World) -> None:
    pairs = [("What is it? ->", " a test")] * 50
    tokenizer = Tokenizer.from_folder(world.home / "checkpoint")
    tokens = sum(len(tokenizer.encode(prompt)) + len(tokenizer.encode(completion)) for prompt, completion in pairs)
    dear = with_bases(world, "[ada]\nfolder = '{folder}'\nprice_per_1k_training_tokens = 2.5\n")
    file = dear.upload(rows(*pairs)).id
    assert cost(dear, training_file=file, n_epochs=3) == f"Fine-tune costs ${2.5 * tokens * 3 / 1000:.2f}"
    assert cost(dear, training_file=file) == f"Fine-tune costs ${2.5 * tokens * 4 / 1000:.2f}"
    assert cost(dear, training_file=file, model="babbage") == "Fine-tune costs $0.00"


def test_a_price_is_the_one_at_the_time_of_asking(world: World) -> None:
    job = world.job()
    dear = with_bases(world, "[ada]\nfolder = '{folder}'\nprice_per_1k_training_tokens = 1000\n")
    dear.jobs.enqueue()
    assert dear.messages(job.id)[1] == "Fine-tune costs $0.00"


def test_jobs_of_the_first_schema_cost_nothing(world: World) -> None:
    job = world.job()
    later = {
        "jobs": "cost_usd paused_unix started_unix finished_unix trained_tokens",
        "models": "step metrics",
        "events": "kind",
    }
    with world.store.transaction() as connection:
        for table, columns in later.items():
            for column in columns.split():
                connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        for table in ("trackings", "aliases"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    world.store.migrate()
    assert world.jobs.get(world.owner, job.id) == job
    world.jobs.enqueue()
    assert world.messages(job.id)[1] == "Fine-tune costs $0.00"


def test_a_hub_model_that_is_not_here_is_not_tuned_and_not_served(world: World) -> None:
    hub = with_bases(world, f"[curie]\nhub = 'org/name'\nrevision = '{COMMIT}'\n")
    for ask in (lambda: hub.job(model="curie"), lambda: hub.models.resolve(hub.owner, "curie")):
        with pytest.raises(NotFound, match=r"has not been pulled.*tunesmith models pull org/name"):
            ask()
    assert "curie" not in [model.name for model in hub.models.list(hub.owner)]
    assert hub.job(model="ada").model == "ada"


def test_a_tuned_model_whose_base_is_gone_says_so(world: World, tmp_path: Path) -> None:
    mine = with_bases(world, "[mine]\nfolder = '{folder}'\n")
    mine.job(model="mine")
    held = claim(mine)
    start(mine, held)
    name = succeed(mine, held).fine_tuned_model
    assert name is not None
    gone = with_bases(world, "")
    for ask in (lambda: gone.job(model=name), lambda: gone.models.resolve(gone.owner, name)):
        with pytest.raises(NotFound, match="The base `mine` is not among those of this server"):
            ask()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "no-such-model"}, "no forward pass for model_type 'no-such-model'"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "soft-capped"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_a_base_that_cannot_be_run_is_neither_tuned_nor_served(
    world: World, fields: dict[str, object], reason: str
) -> None:
    folder = world.home / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, world.home / "odd")
    (world.home / "odd" / "config.json").write_text(json.dumps(config | fields))
    odd = with_bases(world, "[curie]\nfolder = 'odd'\n")
    for ask in (lambda: odd.job(model="curie"), lambda: odd.models.resolve(odd.owner, "curie")):
        with pytest.raises(
            InvalidRequest, match=f"The base `curie` cannot be used on this server: .*{reason}"
        ) as error:
            ask()
        assert error.value.param == "model"
        assert str(world.home) not in error.value.message
    assert odd.job(model="ada").model == "ada"


def test_a_base_whose_tokenizer_cannot_be_used_is_not_tuned(world: World) -> None:
    shutil.copytree(world.home / "checkpoint", world.home / "odd")
    (world.home / "odd" / "tokenizer.json").write_text("{}")
    odd = with_bases(world, "[curie]\nfolder = 'odd'\n")
    with pytest.raises(InvalidRequest, match="`curie` cannot be used on this server: the tokenizer's decoder is none"):
        odd.job(model="curie")
