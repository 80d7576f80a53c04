"""Names that answer with the model of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.conftest import World, trained
from tunesmith.core.jobs import Job
from tunesmith.errors import InvalidRequest, NotFound, PermissionDenied

OLD = "curie:ft-acme-2023-01-31-10-20-30"


def succeed(world: World, job: Job, folder: Path) -> str:
    claim = world.jobs.claim("here", 60)
    assert claim is not None
    assert claim.job.id == job.id
    world.jobs.started(claim, "1:1", world.jobs.hyperparameters(job, job.training_examples))
    adapter, results = trained(folder)
    name = world.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1).fine_tuned_model
    assert name is not None
    return name


def test_an_alias_answers_once_its_job_has_succeeded(world: World, tmp_path: Path) -> None:
    job = world.job(alias=OLD)
    with pytest.raises(NotFound) as waiting:
        world.models.resolve(world.owner, OLD)
    assert waiting.value.code == "model_not_found"
    assert waiting.value.message == (
        f"The model `{OLD}` does not exist yet: it is a name kept for the model of fine-tune {job.id}, which is "
        "pending. It answers as soon as that fine-tune has succeeded."
    )
    name = succeed(world, job, tmp_path)
    assert world.models.resolve(world.owner, OLD).name == name
    assert world.models.resolve(world.member, OLD).name == name
    shown = world.models.get(world.owner, OLD)
    assert (shown.name, shown.parent_name, shown.note) == (OLD, name, f"another name of {name}")
    assert (shown.owned_by, shown.base_name) == ("your-org", "ada")
    assert OLD in [model.name for model in world.models.list(world.owner)]

    follower = world.job(model=OLD)
    assert (follower.model, follower.parent_name) == (OLD, name)


def test_an_alias_is_its_organisations(world: World) -> None:
    world.job(alias=OLD)
    with pytest.raises(NotFound, match="GET /v1/models lists"):
        world.models.resolve(world.stranger, OLD)
    assert OLD not in [model.name for model in world.models.list(world.stranger)]
    with pytest.raises(NotFound):
        world.models.delete(world.stranger, OLD)
    world.job(world.stranger, alias=OLD)  # they have their own


def test_only_owners_take_it_away_and_the_model_stays(world: World, tmp_path: Path) -> None:
    name = succeed(world, world.job(alias=OLD), tmp_path)
    with pytest.raises(PermissionDenied):
        world.models.delete(world.member, OLD)
    world.models.delete(world.owner, OLD)
    with pytest.raises(NotFound):
        world.models.get(world.owner, OLD)
    assert world.models.get(world.owner, name).name == name


def test_an_alias_of_a_deleted_model_says_so(world: World, tmp_path: Path) -> None:
    name = succeed(world, world.job(alias=OLD), tmp_path)
    world.models.delete(world.owner, name)
    with pytest.raises(NotFound, match=name):
        world.models.resolve(world.owner, OLD)


@pytest.mark.parametrize("name", ["ada", "", "a b", "a\nb", "x" * 257])
def test_names_that_cannot_be_aliases(world: World, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        world.job(alias=name)
    assert refused.value.param == "alias"
    assert world.jobs.list(world.owner) == []


def test_a_taken_name_is_refused_until_its_job_has_failed(world: World) -> None:
    first = world.job(alias=OLD)
    with pytest.raises(InvalidRequest, match=f"a name kept for the model of fine-tune {first.id}"):
        world.job(alias=OLD)
    assert len(world.jobs.list(world.owner)) == 1
    world.jobs.cancel(world.owner, first.id)
    with pytest.raises(NotFound, match="Start that fine-tune again"):
        world.models.resolve(world.owner, OLD)
    second = world.job(alias=OLD)
    alias = world.models.get(world.owner, OLD).alias
    assert alias is not None
    assert alias.job_id == second.id


def test_the_name_of_a_model_is_no_alias(world: World, tmp_path: Path) -> None:
    name = succeed(world, world.job(), tmp_path)
    with pytest.raises(InvalidRequest, match="name of a model here already"):
        world.job(alias=name)
