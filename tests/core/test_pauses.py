"""Jobs that rest and go on, epochs that become models, what is told of the queue, and a clock that jumps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.conftest import World, trained
from tunesmith.core.jobs import INTERRUPTED, Claim, Job, JobStatus
from tunesmith.core.outlook import Outlook, Work, schedule
from tunesmith.errors import InvalidRequest, LeaseLost, NotFound
from tunesmith.rundir import ProgressLine, Snapshot


def claim(world: World) -> Claim:
    claimed = world.jobs.claim("here", 60.0)
    assert claimed is not None
    return claimed


def start(world: World) -> Claim:
    claimed = claim(world)
    world.jobs.started(claimed, "handle", world.jobs.hyperparameters(claimed.job, 2))
    return claimed


def succeed(world: World, claimed: Claim, folder: Path, *steps: int) -> Job:
    adapter, results = trained(folder)
    snapshots = [(Snapshot(step, {"step": step, "training_loss": 1 / step}), adapter) for step in steps]
    return world.jobs.succeed(claimed, adapter_dir=adapter, results_csv=results, trained_tokens=7, snapshots=snapshots)


def test_a_pending_job_that_rests_leaves_the_queue_and_comes_back(world: World) -> None:
    first, second = world.job(), world.job()
    world.jobs.enqueue()

    assert world.jobs.pause(world.owner, first.id).paused
    world.jobs.enqueue()
    assert world.jobs.get(world.owner, second.id).queue_number == 0
    assert claim(world).job.id == second.id
    assert world.jobs.claim("here", 60.0) is None

    assert not world.jobs.resume(world.owner, first.id).paused
    assert claim(world).job.id == first.id
    assert world.messages(first.id)[-2:] == ["Fine-tune paused", "Fine-tune resumed"]


def test_a_running_job_rests_when_its_trainer_is_gone_and_goes_on_without_a_warning(world: World) -> None:
    job = world.job()
    held = start(world)
    assert world.jobs.heartbeat(held, 60.0) is False
    world.jobs.pause(world.owner, job.id)
    assert world.jobs.heartbeat(held, 60.0) is True
    world.jobs.park(held)
    with pytest.raises(LeaseLost):
        world.jobs.heartbeat(held, 60.0)
    assert world.jobs.claim("elsewhere", 60.0) is None
    assert world.jobs.get(world.owner, job.id).status is JobStatus.RUNNING

    world.jobs.resume(world.owner, job.id)
    again = start(world)

    assert (again.run_id, again.handle) == (held.run_id, None)
    assert INTERRUPTED not in world.messages(job.id)
    assert world.messages(job.id).count("Fine-tune started") == 1


def test_a_dispatcher_that_dies_leaves_a_paused_job_to_nobody(world: World) -> None:
    job = world.job()
    start(world)
    world.jobs.pause(world.owner, job.id)
    world.clock.now += 3_600
    assert world.jobs.claim("elsewhere", 60.0) is None
    world.jobs.resume(world.owner, job.id)
    assert claim(world).job.id == job.id


def test_asking_twice_changes_nothing_and_ended_jobs_do_not_rest(world: World) -> None:
    job = world.job()
    world.jobs.resume(world.owner, job.id)
    world.jobs.pause(world.owner, job.id)
    world.jobs.pause(world.owner, job.id)
    assert world.messages(job.id).count("Fine-tune paused") == 1
    assert "Fine-tune resumed" not in world.messages(job.id)

    assert world.jobs.cancel(world.owner, job.id).paused is False
    for verb in (world.jobs.pause, world.jobs.resume):
        with pytest.raises(InvalidRequest, match="cancelled"):
            verb(world.owner, job.id)
        with pytest.raises(NotFound):
            verb(world.stranger, job.id)


def test_kept_epochs_are_models_with_the_lineage_of_their_job(world: World, tmp_path: Path) -> None:
    job = world.job(suffix="mine")
    ended = succeed(world, start(world), tmp_path, 3, 6)
    name = ended.fine_tuned_model
    assert name is not None

    found = world.jobs.checkpoints(world.owner, job.id)

    assert [model.name for model in found] == [f"{name}:ckpt-step-6", f"{name}:ckpt-step-3"]
    assert found[0].metrics == {"step": 6, "training_loss": 1 / 6}
    final = world.models.get(world.owner, name)
    assert {(one.base_name, one.parent_name, one.owned_by) for one in found} == {("ada", "ada", final.owned_by)}
    assert len({model.adapter_dir for model in (final, *found)}) == 3
    assert world.models.resolve(world.owner, f"{name}:ckpt-step-3").adapter_dir == found[1].adapter_dir
    with pytest.raises(NotFound):
        world.jobs.checkpoints(world.stranger, job.id)

    child = world.job(model=f"{name}:ckpt-step-3")
    assert (child.base_name, child.parent_name) == ("ada", f"{name}:ckpt-step-3")


def test_a_model_is_deleted_with_its_checkpoints_and_one_of_them_by_itself(world: World, tmp_path: Path) -> None:
    job = world.job()
    name = succeed(world, start(world), tmp_path, 3, 6, 9).fine_tuned_model
    assert name is not None
    needing = world.job(model=f"{name}:ckpt-step-6")

    world.models.delete(world.owner, f"{name}:ckpt-step-3")
    assert [model.step for model in world.jobs.checkpoints(world.owner, job.id)] == [9, 6]
    with pytest.raises(InvalidRequest, match=f"{name}:ckpt-step-6 is needed by fine-tune {needing.id}"):
        world.models.delete(world.owner, name)

    world.jobs.cancel(world.owner, needing.id)
    world.models.delete(world.owner, name)
    assert world.jobs.checkpoints(world.owner, job.id) == []
    assert not list((world.home / "adapters").iterdir())


def test_metric_events_keep_their_kind(world: World) -> None:
    job = world.job()
    held = start(world)
    world.jobs.record(held, [ProgressLine(1, "info", "Step 1/2: training loss=0.50", {"step": 1}, "metrics")])
    last = world.events.list(job.id)[-1]
    assert (last.kind, last.data) == ("metrics", {"step": 1})


def test_a_clock_set_back_does_not_lock_a_job_for_hours(world: World) -> None:
    world.job()
    held = start(world)
    world.clock.now -= 7_200
    world.jobs.heartbeat(held, 60.0)
    world.clock.now += 61
    assert world.jobs.claim("elsewhere", 60.0) is not None


@pytest.mark.parametrize("field", ["lora_rank", "lora_alpha"])
def test_a_tuned_model_goes_on_with_the_adapter_that_it_has(world: World, tmp_path: Path, field: str) -> None:
    world.job(lora_rank=4, seed=7)
    held = start(world)
    assert (held.job.seed, world.jobs.hyperparameters(held.job, 2).lora_alpha) == (7, 64.0)
    name = succeed(world, held, tmp_path).fine_tuned_model
    with pytest.raises(InvalidRequest, match="goes on with it as it is") as caught:
        world.job(model=name, **{field: 8})
    assert caught.value.param == field
    child = world.job(model=name)
    assert child.asked.method is None
    assert world.jobs.hyperparameters(child, 2).lora_rank is None


def test_a_model_of_all_weights_goes_on_with_all_of_them(world: World, tmp_path: Path) -> None:
    world.job(method="full")
    held = start(world)
    folder, results = trained(tmp_path)
    (folder / "config.json").write_text("{}")
    name = world.jobs.succeed(held, adapter_dir=folder, results_csv=results, trained_tokens=7).fine_tuned_model

    child = world.job(model=name)
    assert child.asked.method == "full"
    assert world.jobs.hyperparameters(child, 2).method == "full"
    with pytest.raises(InvalidRequest, match="so they will be"):
        world.job(model=name, method="lora")


def test_modules_that_the_base_does_not_have_are_named_at_once(world: World) -> None:
    with pytest.raises(
        InvalidRequest, match=r"lora_targets names c_attn, and `ada` has no such module\. It has: q_proj"
    ):
        world.job(lora_targets=("q_proj", "c_attn"))
    job = world.job(lora_targets=("q_proj", "embed_tokens"))
    assert world.jobs.hyperparameters(job, 2).lora_targets == ("q_proj", "embed_tokens")


def test_the_outlook_goes_by_jobs_that_ended(world: World, tmp_path: Path) -> None:
    waiting = world.job()
    assert world.jobs.outlook(waiting) == Outlook(None, None)
    held = start(world)  # two examples, four epochs
    world.clock.now += 80
    succeed(world, held, tmp_path)
    now = int(world.clock.now)

    running, next_ = world.job(n_epochs=1), world.job(n_epochs=3)
    start(world)
    world.clock.now += 5

    assert world.jobs.outlook(running) == Outlook(None, now + 20)
    assert world.jobs.outlook(next_) == Outlook(now + 20, now + 80)


def test_a_schedule_fills_slots_and_stays_silent_behind_what_it_cannot_tell() -> None:
    running = [Work("r", "ada", 10, 90)]
    waiting = [
        Work("a", "ada", 5, None),
        Work("b", "ada", 1, None),
        Work("c", "other", 1, None),
        Work("d", "ada", 1, None),
    ]
    found = schedule(running, waiting, {"ada": 2.0}, now_unix=100, slots=2)
    assert found == {
        "r": Outlook(None, 110),
        "a": Outlook(100, 110),
        "b": Outlook(110, 112),
        "c": Outlook(None, None),
        "d": Outlook(None, None),
    }
    assert schedule(running, [], {}, now_unix=100, slots=1) == {"r": Outlook(None, None)}
    late = schedule([Work("r", "ada", 10, 0)], [Work("a", "ada", 5, None)], {None: 2.0}, now_unix=100, slots=1)
    assert late == {"r": Outlook(None, 100), "a": Outlook(100, 110)}
