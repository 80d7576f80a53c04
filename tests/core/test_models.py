from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.core.conftest import START_UNIX, World, trained
from tunesmith.core.accounts import Caller
from tunesmith.core.models import SWEEP_AFTER_S, Model, ModelRef
from tunesmith.errors import InvalidRequest, NotFound, PermissionDenied


def tune(world: World, caller: Caller | None = None, **fields: object) -> Model:
    """A tuned model, by the road that jobs take."""
    caller = caller or world.owner
    job = world.job(caller, **fields)
    claim = world.jobs.claim("d", 60)
    assert claim is not None
    assert claim.job.id == job.id
    adapter, results = trained(world.home / "runs" / job.id)
    done = world.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)
    assert done.fine_tuned_model is not None
    return world.models.get(caller, done.fine_tuned_model)


def test_bases_are_everybodys(world: World) -> None:
    names = [base.name for base in world.bases.list()]
    assert [model.name for model in world.models.list(world.stranger)] == names
    ada = world.models.get(world.stranger, "ada")
    assert (ada.base_name, ada.parent_name, ada.adapter_dir, ada.organization_id) == ("ada", None, None, None)
    assert world.models.resolve(world.stranger, "ada") == ModelRef(
        name="ada", base_name="ada", base_dir=world.home / "checkpoint", adapter_dir=None, context_tokens=2049
    )


def test_a_tuned_model_is_listed_after_the_bases_with_its_lineage(world: World) -> None:
    model = tune(world)
    assert model == Model(
        name="ada:ft-your-org-2022-02-16-08-26-40",
        created_unix=START_UNIX,
        owned_by="your-org",
        base_name="ada",
        parent_name="ada",
        organization_id=world.owner.organization_id,
        adapter_dir=model.adapter_dir,
        method="lora",
    )
    assert world.models.list(world.member)[-1] == model
    ref = world.models.resolve(world.member, model.name)
    assert (ref.base_name, ref.adapter_dir, ref.context_tokens) == ("ada", model.adapter_dir, 2049)
    assert ref.adapter_dir is not None
    assert (ref.adapter_dir / "adapter_model.safetensors").read_bytes() == b"weights" * 1000


def test_models_made_in_one_second_get_different_names(world: World) -> None:
    names = [tune(world, suffix="x").name for _ in range(3)]
    assert names == [f"ada:ft-your-org:x-2022-02-16-08-26-4{second}" for second in range(3)]


def test_other_organizations_models_do_not_exist(world: World) -> None:
    model = tune(world)
    assert model not in world.models.list(world.stranger)
    for call in (world.models.get, world.models.resolve, world.models.delete):
        with pytest.raises(NotFound, match=f"The model `{model.name}` does not exist") as caught:
            call(world.stranger, model.name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert world.models.get(world.owner, model.name) == model


def test_only_owners_delete(world: World) -> None:
    model = tune(world)
    with pytest.raises(PermissionDenied, match="role owner"):
        world.models.delete(world.member, model.name)
    assert world.models.get(world.member, model.name) == model
    assert model.adapter_dir is not None
    assert model.adapter_dir.is_dir()


@pytest.mark.parametrize("who", ["owner", "member"])
def test_bases_cannot_be_deleted(world: World, who: str) -> None:
    with pytest.raises(PermissionDenied, match="base model"):
        world.models.delete(getattr(world, who), "ada")


def test_a_deleted_model_is_gone_with_its_adapter_and_the_job_keeps_its_name(world: World) -> None:
    model = tune(world)
    world.models.delete(world.owner, model.name)
    assert list((world.home / "adapters").iterdir()) == []
    assert model not in world.models.list(world.owner)
    for call in (world.models.get, world.models.resolve, world.models.delete):
        with pytest.raises(NotFound):
            call(world.owner, model.name)
    (job,) = world.jobs.list(world.owner)
    assert job.fine_tuned_model == model.name
    assert tune(world).name != model.name  # in the same second


def test_a_model_that_a_job_trains_on_from_stays(world: World) -> None:
    model = tune(world)
    job = world.job(model=model.name)
    with pytest.raises(InvalidRequest, match=f"{job.id}, which is pending"):
        world.models.delete(world.owner, model.name)
    world.jobs.cancel(world.owner, job.id)
    world.models.delete(world.owner, model.name)


def test_a_child_lives_on_without_its_parent(world: World) -> None:
    parent = tune(world)
    child = tune(world, model=parent.name)
    world.models.delete(world.owner, parent.name)
    assert world.models.get(world.owner, child.name).parent_name == parent.name
    assert child.adapter_dir is not None
    assert child.adapter_dir.is_dir()


def test_resolving_for_a_job_needs_no_caller(world: World) -> None:
    model = tune(world)
    assert world.models.resolve_in(world.owner.organization_id, model.name) == world.models.resolve(
        world.owner, model.name
    )
    with pytest.raises(NotFound):
        world.models.resolve_in(world.stranger.organization_id, model.name)


def test_the_sweep_takes_what_a_crash_left_and_nothing_else(world: World, tmp_path: Path) -> None:
    assert world.models.sweep() == 0  # nothing was ever trained
    model = tune(world)
    adapter, _ = trained(tmp_path / "run")
    orphan = world.home / "adapters" / world.models.keep(adapter)
    deleted = tune(world)
    assert deleted.adapter_dir is not None
    half_deleted = deleted.adapter_dir.with_name(deleted.adapter_dir.name + ".trash")
    half_deleted.mkdir()
    world.models.delete(world.owner, model.name)
    later = time.time() + SWEEP_AFTER_S + 60
    world.clock.now = later
    fresh = world.home / "adapters" / world.models.keep(adapter)
    os.utime(fresh, (later, later))
    assert world.models.sweep() == 2
    assert set((world.home / "adapters").iterdir()) == {deleted.adapter_dir, fresh}
    assert not orphan.exists()
