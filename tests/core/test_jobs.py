"""What users do with jobs: create with every check, list, get, cancel."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from tests.core.conftest import START_UNIX, World, rows, trained
from tunesmith.core.jobs import FineTuneRequest, Job, JobStatus
from tunesmith.core.schema import events, jobs
from tunesmith.data.chat import Chat
from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest, NotFound, TunesmithError

SPORTS = rows(("p1", " baseball"), ("p2", " hockey"), ("p3", " hockey"))
VALID = rows(("v1", " hockey"), ("v2", " baseball"))
THREE = rows(("p1", " a"), ("p2", " b"), ("p3", " c"))


def refusal(world: World, kind: type[TunesmithError] = InvalidRequest, **fields: object) -> TunesmithError:
    """What `create` says; nothing was made."""
    with pytest.raises(kind) as caught:
        world.job(**fields)
    assert type(caught.value) is kind
    with world.store.reading() as connection:
        assert connection.execute(select(jobs)).first() is None
        assert connection.execute(select(events)).first() is None
    return caught.value


def test_a_new_job_is_pending_with_what_was_asked_and_one_event(world: World) -> None:
    training, validation = world.upload(SPORTS), world.upload(VALID)
    request = FineTuneRequest(
        training_file=training.id,
        validation_file=validation.id,
        model="ada",
        suffix="Custom model name",
        n_epochs=2,
        compute_classification_metrics=True,
        classification_positive_class=" baseball",
        classification_betas=(0.5, 1.0),
    )
    job = world.jobs.create(world.member, request)
    assert job == Job(
        id=job.id,
        organization_id=world.owner.organization_id,
        model="ada",
        base_name="ada",
        parent_name=None,
        status=JobStatus.PENDING,
        created_unix=START_UNIX,
        updated_unix=START_UNIX,
        fine_tuned_model=None,
        asked=request,
        hyperparameters=None,
        training_file=training,
        validation_file=validation,
        result_files=(),
        error=None,
        seed=job.seed,
        training_examples=3,
        queue_number=None,
        paused=False,
        started_unix=None,
        finished_unix=None,
        trained_tokens=None,
    )
    assert job.id.startswith("ft-")
    assert len(job.id) == 27
    assert world.messages(job.id) == [f"Created fine-tune: {job.id}"]
    assert world.jobs.get(world.owner, job.id) == job


def test_the_same_request_at_another_time_has_the_same_seed(world: World) -> None:
    first = world.job()
    world.clock.now += 12_345
    assert world.job().seed == first.seed


def test_lists_are_oldest_first_and_of_one_organization(world: World) -> None:
    made = [world.job(), world.job(caller=world.member), world.job()]
    assert world.jobs.list(world.owner) == made
    assert world.jobs.list(world.stranger) == []


def test_other_organizations_jobs_do_not_exist(world: World) -> None:
    job = world.job()
    for call in (world.jobs.get, world.jobs.cancel):
        with pytest.raises(NotFound, match=f"No such fine-tune: {job.id}") as caught:
            call(world.stranger, job.id)
        assert caught.value.param == "id"
    assert world.jobs.get(world.owner, job.id) == job


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_unknown_foreign_and_deleted_files_are_the_same(world: World, param: str) -> None:
    foreign = world.upload(SPORTS, world.stranger).id
    deleted = world.upload(SPORTS).id
    world.files.delete(world.owner, deleted)
    for file_id in ("file-none", foreign, deleted, "train.jsonl", ""):
        error = refusal(world, **{param: file_id})
        assert error.param == param
        assert error.message.startswith(f"No such File object: {file_id}.")


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_files_of_another_purpose_are_refused(world: World, param: str) -> None:
    error = refusal(world, **{param: world.upload(SPORTS, purpose="assistants").id})
    assert error.param == param
    assert "`assistants`" in error.message


@pytest.mark.parametrize("model", ["", "gpt-4", "ada:ft-your-org-2022-02-15-04-21-04", "x" * 1000])
def test_an_unknown_model_is_refused(world: World, model: str) -> None:
    error = refusal(world, NotFound, model=model)
    assert (error.code, error.param) == ("model_not_found", "model")


def test_bounds_are_checked_first_and_need_no_file(world: World) -> None:
    assert refusal(world, training_file="file-none", n_epochs=0).param == "n_epochs"


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_rows_over_the_limit_are_named_with_their_counts(world: World, param: str) -> None:
    fits = " a" * 2047
    content = rows(("a", fits), ("a", fits + " a"), ("short", " b"), ("", " a" * 2048), ("\n\n" + fits, " a a a"))
    error = refusal(world, **{param: world.upload(content).id})
    assert error.param == param
    assert "2048 tokens" in error.message
    assert "row 2 (2049 tokens)" in error.message
    assert "row 4 (2049 tokens)" in error.message
    assert "row 1 " not in error.message
    assert "row 5 (" in error.message


def test_a_row_of_2048_tokens_is_taken(world: World) -> None:
    assert world.job(training_file=world.upload(rows(("", " a" * 2047))).id).training_examples == 1


ALIKE = rows(("a ->", " baseball game"), ("b ->", " baseball match"))
BINARY = {"classification_positive_class": " baseball"}


@pytest.mark.parametrize(
    ("training", "validation", "flags", "param", "words"),
    [
        (SPORTS, VALID, {"classification_n_classes": 3}, "classification_n_classes", "3 classes.*2 different"),
        (THREE, THREE, {"classification_n_classes": 2}, "classification_n_classes", "at least 3.*row 3 adds ' c'"),
        (SPORTS, VALID, {"classification_positive_class": "baseball"}, "classification_positive_class", "mean ' base"),
        (
            SPORTS,
            VALID,
            {"classification_positive_class": " cat"},
            "classification_positive_class",
            "are ' baseball', ",
        ),
        (THREE, THREE, {"classification_positive_class": " a"}, "classification_positive_class", "row 3 adds ' c'"),
        (
            rows(("p", " baseball"), ("q", " baseball")),
            VALID,
            BINARY,
            "classification_positive_class",
            "2 classes, and training_file has 1",
        ),
        (SPORTS, rows(("v", " hockey"), ("w", " golf")), BINARY, "validation_file", "' golf' in row 2"),
        (SPORTS, THREE, {"classification_n_classes": 2}, "validation_file", "' a' in row 1"),
        (ALIKE, ALIKE, {"classification_n_classes": 2}, "compute_classification_metrics", "begin with the same token"),
    ],
)
def test_flags_that_contradict_the_data_are_refused(
    world: World, training: bytes, validation: bytes, flags: dict[str, object], param: str, words: str
) -> None:
    files = {"training_file": world.upload(training).id, "validation_file": world.upload(validation).id}
    error = refusal(world, **files, **flags, compute_classification_metrics=True)
    assert error.param == param
    with pytest.raises(TunesmithError, match=words):
        raise error


@pytest.mark.parametrize(
    ("training", "flags"),
    [
        (SPORTS, {"classification_n_classes": 2}),
        (SPORTS, BINARY),
        (SPORTS, BINARY | {"classification_n_classes": 2}),
        (THREE + SPORTS, {"classification_n_classes": 5}),
    ],
)
def test_flags_that_fit_the_data_are_taken(world: World, training: bytes, flags: dict[str, object]) -> None:
    files = {"training_file": world.upload(training).id, "validation_file": world.upload(VALID).id}
    job = world.job(**files, **flags, compute_classification_metrics=True)
    assert job.status is JobStatus.PENDING


def test_what_is_deleted_between_check_and_insert_is_unknown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are read outside the transaction: one that goes meanwhile must not slip in."""
    training = world.upload(SPORTS)
    examples = world.files.examples

    def read_then_lose(file: object, chat: Chat) -> list[Example]:
        found = list(examples(training, chat))
        world.files.delete(world.owner, training.id)
        return found

    monkeypatch.setattr(world.files, "examples", read_then_lose)
    assert refusal(world, training_file=training.id).param == "training_file"


def test_cancelling_a_pending_job_ends_it_at_once(world: World) -> None:
    job = world.job()
    world.clock.now += 5
    cancelled = world.jobs.cancel(world.member, job.id)
    assert cancelled.status is JobStatus.CANCELLED
    assert cancelled.updated_unix == START_UNIX + 5
    assert world.messages(job.id)[-1] == "Fine-tune cancelled"
    assert world.jobs.claim("d", 60) is None


@pytest.mark.parametrize("ending", ["cancelled", "failed", "succeeded"])
def test_an_ended_job_cannot_be_cancelled(world: World, tmp_path: object, ending: str) -> None:
    job = world.job()
    claim = world.jobs.claim("d", 60)
    assert claim is not None
    if ending == "cancelled":
        world.jobs.cancel(world.owner, job.id)
    elif ending == "failed":
        world.jobs.fail(claim, "It broke.")
    else:
        adapter, results = trained(world.home / "run")
        world.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)
    before = world.messages(job.id)
    with pytest.raises(InvalidRequest, match=f"it is {ending}"):
        world.jobs.cancel(world.owner, job.id)
    assert world.messages(job.id) == before
    assert world.jobs.get(world.owner, job.id).status == ending


def test_training_goes_on_from_a_tuned_model(world: World) -> None:
    world.job()
    first = world.jobs.claim("d", 60)
    assert first is not None
    adapter, results = trained(world.home / "run")
    parent = world.jobs.succeed(first, adapter_dir=adapter, results_csv=results, trained_tokens=1).fine_tuned_model
    assert parent is not None
    job = world.job(model=parent, suffix="again")
    assert (job.model, job.base_name, job.parent_name) == (parent, "ada", parent)
    world.clock.now += 1
    second = world.jobs.claim("d", 60)
    assert second is not None
    done = world.jobs.succeed(second, adapter_dir=adapter, results_csv=results, trained_tokens=1)
    assert done.fine_tuned_model == "ada:ft-your-org:again-2022-02-16-08-26-41"
    model = world.models.get(world.owner, done.fine_tuned_model)
    assert (model.base_name, model.parent_name) == ("ada", parent)


def test_another_organizations_model_is_no_parent(world: World) -> None:
    world.job()
    claim = world.jobs.claim("d", 60)
    assert claim is not None
    adapter, results = trained(world.home / "run")
    name = world.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1).fine_tuned_model
    with pytest.raises(NotFound, match="does not exist"):
        world.job(caller=world.stranger, model=name)
