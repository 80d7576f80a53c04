"""What the doctor says of accepted data: in a file's `status_details`, in a job's events; and it refuses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.conftest import World, rows
from tunesmith.core import notices
from tunesmith.core.notices import MOST_NOTICES, about_job, about_upload
from tunesmith.data.doctor import Codec
from tunesmith.data.formats import Example
from tunesmith.data.sample import SAMPLED_CHARACTERS, Sample
from tunesmith.data.verdict import judge

SECRET = "sk-proj-a8Fj3kLm29dKwq77ZpRt"
CLEAN = [(f"{n} parcels came ->", " yes" if n % 2 else " no") for n in range(240)]


def sample(pairs: list[tuple[str, str]]) -> Sample:
    taken = Sample()
    for prompt, completion in pairs:
        taken.add(Example(prompt, completion))
    return taken


def codec() -> Codec:
    return Codec(lambda texts: [list(text.encode()) for text in texts], lambda ids: bytes(ids).decode(), ("<end>",))


def test_clean_data_is_passed_in_silence(world: World) -> None:
    file = world.upload(rows(*CLEAN))
    assert file.status_details is None
    job = world.job(training_file=file.id)
    warned = [event for event in world.events.list(job.id) if event.level == "warn" and "class_" not in event.message]
    assert warned == []  # the tokenizer of these tests has no whole words


def test_an_upload_says_what_is_odd_and_is_processed_all_the_same(world: World) -> None:
    file = world.upload(rows(*CLEAN, (f"Is it {SECRET}? ->", " no"), CLEAN[5]))
    assert file.status == "processed"
    assert file.status_details is not None
    assert "Data check secrets in the training file, rows 241:" in file.status_details
    assert "Data check duplicated_rows in the training file, rows 242:" in file.status_details
    assert "Fix: Remove these rows." in file.status_details
    assert SECRET not in file.status_details
    assert world.files.get(world.owner, file.id) == file


def test_files_that_are_no_training_data_are_not_looked_at(world: World) -> None:
    assert world.upload(rows(("a", SECRET)), purpose="user_data").status_details is None


def test_a_job_is_warned_after_its_first_event_and_before_it_costs_anything(world: World) -> None:
    training = world.upload(rows(*CLEAN, (f"Is it {SECRET}? ->", " no")))
    validation = world.upload(rows(("Never seen ->", " yes"), CLEAN[7]))
    job = world.job(training_file=training.id, validation_file=validation.id)
    world.jobs.enqueue()
    events = world.events.list(job.id)
    levels = [event.level for event in events]
    assert levels[0] == "info"
    assert levels[-2:] == ["info", "info"]
    assert set(levels[1:-2]) == {"warn"}
    told = {event.data["finding"]: event for event in events if event.level == "warn" and event.data}
    assert next(iter(told)) == "secrets"  # the worst first
    assert told["overlap_exact"].message.startswith("Data check overlap_exact in the validation file, rows 2: ")
    assert told["overlap_exact"].data == {
        "finding": "overlap_exact",
        "severity": "suggested",
        "file": "validation",
        "count": 1,
        "rows": [2],
        "looked_at": 2,
        "fix": "Remove them from one of the two files",
    }


def test_a_handful_of_events_at_most() -> None:
    pairs = [*CLEAN, CLEAN[3], (CLEAN[4][0], " yes"), ("A <end> ->", "yes"), (f"{SECRET} -> a ->", " no"), ("", " yes")]
    pairs += [("card 4012888888881881 ->", " no"), ("bell \x07 ->", " no"), ("jane.doe@mailbox.org ->", " no")]
    told = about_job(sample(pairs), None, codec())
    assert len(told) == MOST_NOTICES
    assert [notice.data.get("severity") for notice in told[:2]] == ["required", "required"]
    assert "control_characters" in " ".join(notice.message for notice in told)
    assert "`tunesmith doctor`" in told[-1].message
    assert all("\n" not in notice.message for notice in told)


def test_of_a_few_rows_only_harm_is_told() -> None:
    assert about_upload(sample([("a", "b")] * 3)) is None
    assert "secrets" in str(about_upload(sample([("a", SECRET)] * 3)))


def test_only_the_first_part_of_a_file_is_looked_at_and_that_is_said() -> None:
    text = "parcel " * 100
    many = [(f"{text}{n} ->", " yes" if n % 2 else " no") for n in range(3 * SAMPLED_CHARACTERS // len(text))]
    late = sample([*many, many[3], (SECRET, " maybe")])
    assert late.taken < late.rows // 2
    assert about_upload(late) is None
    early = sample([many[0], *many])
    assert f"rows 2 (of the first {early.taken:,})" in str(about_upload(early))


def test_a_large_file_takes_no_longer_than_a_small_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the rows that the doctor sees: a clock would be disturbed."""
    seen: list[int] = []
    real = judge

    def counting(training, *others):  # type: ignore[no-untyped-def]
        seen.append(sum(len(batch) for batch in training.batches()))
        return real(training, *others)

    monkeypatch.setattr(notices, "judge", counting)

    def chunks(count: int) -> Iterator[bytes]:
        for start in range(0, count, 100):
            yield rows(*((f"{n} {'parcel ' * 50} ->", " yes") for n in range(start, start + 100)))

    world.upload(chunks(6_000))
    world.upload(chunks(12_000))
    assert seen[0] == seen[1] < 4_000


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", " ->", "a ->", " yes", "\0", SECRET, "jane.doe@mailbox.org", "<end>", "\x07", "e\u0301", "4012888888881881"]
)
pairs = st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=40)


@given(pairs, st.none() | pairs)
def test_no_rows_whatever_they_are_stop_it(
    training: list[tuple[str, str]], validation: list[tuple[str, str]] | None
) -> None:
    told = about_job(sample(training), None if validation is None else sample(validation), codec())
    assert len(told) <= MOST_NOTICES
    for notice in told:
        assert SECRET not in notice.message
        json.dumps(dict(notice.data))
    about_upload(sample(training))
